"""Who is compared: the published structure, a clean eager form, that form compiled, and the backends.

- ``published``: `benchmarks.published`.
- ``eager``: the layers of `msformer_kernels` on backend "reference": each product once, Linear in place of 1x1
  convolutions, channels-last depthwise convolution.
- ``compile``: `torch.compile` of ``eager``, one graph, for this shape alone.
- ``native`` and whatever other backends there are: the layers on that backend. ``native (avx2)``: with that variant of
  its code, in a process of its own (`benchmarks.variants`).

In bfloat16 the backends get weights and inputs in bfloat16. The others run as PyTorch recommends, under autocast with
weights and inputs in float32. All of them get the same numbers, which bfloat16 can hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import msformer_kernels

PLAIN = ("published", "eager", "compile")
EXACT = "exact"
"""Not a rival: the clean form in float64, which the results of all are compared with; or "native exact", and so on."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STORAGE = DTYPES | {"float16": torch.float16, "tf32": torch.float32}
"""By the name of a dtype, what values are stored in; the last two are measured on a GPU."""
PRECISIONS = ("highest", "high", "medium")
"""Of float32 products, as `torch.set_float32_matmul_precision` takes them."""
Function = TypeVar("Function", bound=Callable[..., Any])


def type_name(dtype: str, precision: str) -> str:
    """The dtype, and with float32 the precision of products, such as "float32 high"."""
    return f"{dtype} {precision}" if dtype == "float32" else dtype


def backends() -> tuple[str, ...]:
    """Ours, that are available here."""
    # on the CPU, Triton has only its interpreter
    return tuple(name for name in msformer_kernels.available_backends() if name not in ("reference", "triton"))


def all_rivals() -> tuple[str, ...]:
    return PLAIN + backends()


def is_exact(rival: str) -> bool:
    return rival.endswith(EXACT)


def backend_of(rival: str) -> str:
    """The backend that the layers of a rival run on."""
    return "reference" if rival in (*PLAIN, EXACT) else rival.split()[0]


def variant_of(rival: str) -> str | None:
    """The variant of the CPU kernels that a rival such as ``native (avx2)`` names."""
    return rival.partition("(")[2].rstrip(")") or None


def is_ours(rival: str) -> bool:
    return backend_of(rival) != "reference"


def storage_dtype(rival: str, dtype: str) -> torch.dtype:
    """Of the weights and inputs of a layer."""
    if is_exact(rival):
        return torch.float64
    return DTYPES[dtype] if is_ours(rival) else torch.float32


def uses_autocast(rival: str, dtype: str, whole_model: bool) -> bool:
    """A whole model keeps its weights in float32, ours too."""
    return dtype == "bfloat16" and not is_exact(rival) and (whole_model or not is_ours(rival))


def mode(rival: str, dtype: str, whole_model: bool) -> str:
    """How the rival computes, in a word, for the report."""
    if dtype != "bfloat16":
        return dtype
    return "autocast" if uses_autocast(rival, dtype, whole_model) else "bfloat16 tensors"


@contextmanager
def running(rival: str, dtype: str, whole_model: bool = False) -> Iterator[None]:
    """The backend and autocast that a rival runs under."""
    autocast = torch.autocast("cpu", torch.bfloat16) if uses_autocast(rival, dtype, whole_model) else nullcontext()
    with msformer_kernels.use_backend(backend_of(rival)), autocast:
        yield


def compiled(rival: str, function: Function) -> Function:
    """`function`, compiled if that is what the rival is."""
    if rival != "compile":
        return function
    return cast(Function, torch.compile(function, fullgraph=True, dynamic=False))


# On a GPU the Triton kernels are compared with the same layers as one would write them for speed: softmaxes and
# products in the dtype of the input (the reference computes attention in float32, and would be too easy a rival).
# Parameters are those of the layer that is compared.


def plain_attention(layer: msformer_kernels.EfficientAttention, norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """``x + layer(norm(x))``."""
    tokens, heads = norm(x), layer.num_heads

    def project(projection: nn.Conv2d) -> Tensor:
        out = F.linear(tokens, projection.weight.flatten(1), projection.bias)
        return out.unflatten(-1, (heads, -1)).transpose(1, 2)

    query, key, value = project(layer.queries), project(layer.keys), project(layer.values)
    context = key.softmax(-2).transpose(-1, -2) @ value
    attended = (query.softmax(-1) @ context).transpose(1, 2).flatten(2)
    return x + F.linear(attended, layer.reprojection.weight.flatten(1), layer.reprojection.bias)


def plain_mix_ffn(layer: msformer_kernels.MixFFNSkip, norm: nn.LayerNorm, x: Tensor, height: int, width: int) -> Tensor:
    """``x + layer(norm(x))``, MixFFN-skip."""
    hidden = layer.fc1(norm(x))
    image = hidden.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    mixed = layer.dwconv.dwconv(image).permute(0, 2, 3, 1).flatten(1, 2) + hidden
    assert layer.norm1 is not None
    return x + layer.fc2(F.gelu(layer.norm1(mixed)))


def plain_block(block: msformer_kernels.EfficientTransformerBlock, x: Tensor, height: int, width: int) -> Tensor:
    assert isinstance(block.mlp, msformer_kernels.MixFFNSkip)
    x = plain_attention(block.attn, block.norm1, x)
    return plain_mix_ffn(block.mlp, block.norm2, x, height, width)
