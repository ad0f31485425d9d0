"""What the GPU check runs: cases of `benchmarks.cases`, by dtype, with a mask where it says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..cases import SEGFORMER, Case, parse_shape
from ..rivals import STORAGE
from .items import Skip

DTYPES = ("bfloat16", "float16", "tf32", "float32")
OPERATORS = {
    "attention": ("efficient_self_attention",),
    "efficient_attention": ("efficient_attention",),
    "mix_ffn": ("mix_ffn",),
    "mix_ffn_skip": ("mix_ffn",),
    "batch_norm": ("batch_norm",),
    "block": ("efficient_self_attention", "mix_ffn"),
}
"""The operators of msformer_kernels that an operation calls."""


@dataclass(frozen=True)
class GpuCase(Case):
    """``efficient_attention`` is that of queries, keys and values without their projections."""

    masked: bool = False

    def __str__(self) -> str:
        return f"{self.operation} {self.shape} {self.dtype}{' masked' if self.masked else ''}"

    @property
    def storage(self) -> torch.dtype:
        return STORAGE[self.dtype]

    def to_json(self) -> dict[str, Any]:
        return {
            "operation": self.operation,
            "shape": str(self.shape),
            "dtype": self.dtype,
            "passes": self.passes,
            "masked": self.masked,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> GpuCase:
        return cls(**content | {"shape": parse_shape(content["shape"])})

    def layer(self) -> nn.Module:
        """With the same weights at each call."""
        import msformer_kernels as kernels

        torch.manual_seed(0)
        dim, heads, hidden = self.shape.dim, self.shape.heads, self.shape.hidden
        if self.operation == "attention":
            return nn.ModuleDict(
                {"norm": nn.LayerNorm(dim), "attention": kernels.EfficientAttention(dim, num_heads=heads)}
            )
        if self.operation in ("mix_ffn", "mix_ffn_skip"):
            kind = kernels.MixFFN if self.operation == "mix_ffn" else kernels.MixFFNSkip
            return nn.ModuleDict({"norm": nn.LayerNorm(dim), "mix_ffn": kind(dim, hidden)})
        if self.operation == "batch_norm":
            return kernels.TokenBatchNorm(dim)
        return kernels.EfficientTransformerBlock(dim, num_heads=heads, mlp_ratio=hidden / dim)

    def run(self, layer: Any, x: Tensor) -> tuple[Tensor, ...]:
        """All outputs, of ``[B, N, C]``."""
        import msformer_kernels as kernels

        height, width = self.shape.height, self.shape.width
        mask = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]) % 3 != 0 if self.masked else None
        if self.operation == "attention":
            return tuple(layer["attention"](x, norm=layer["norm"], mask=mask, residual=True))
        if self.operation == "efficient_attention":
            query = x.unflatten(-1, (self.shape.heads, -1)).transpose(1, 2)
            return kernels.efficient_attention(query, query * 2, query + 1, mask=mask)
        if self.operation in ("mix_ffn", "mix_ffn_skip"):
            return (layer["mix_ffn"](x, height, width, norm=layer["norm"], residual=True),)
        if self.operation == "batch_norm":
            return (layer(x),)
        return tuple(layer(x, height, width))

    def check_backend(self, backend: str) -> list[str]:
        """The operators of this case that the backend has no kernels for, which run on another.

        Raises Skip where it has none at all.
        """
        from msformer_kernels.core.operator import OPERATORS as KNOWN

        missing = [name for name in OPERATORS[self.operation] if KNOWN[name].why_not(backend) is not None]
        if len(missing) == len(OPERATORS[self.operation]):
            raise Skip(f"{backend} has no kernels for {' and '.join(missing)}")
        return missing


def set_tf32(dtype: str) -> None:
    """PyTorch's setting for float32 products, which the kernels follow."""
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"


def gpu_backends(device: str) -> list[str]:
    """The backends that run on a GPU, or stand for it on the CPU: Triton's interpreter, an emulation."""
    from msformer_kernels import available_backends

    return [name for name in available_backends(device) if name not in ("reference", "native")]


def uses_triton(backend: str) -> bool:
    from msformer_kernels.core.backends import MODULES

    return MODULES.get(backend, "").startswith("triton")


def _case(operation: str, text: str, masked: bool = False) -> GpuCase:
    return GpuCase(operation, parse_shape(text), "bfloat16", "training", masked)


def in_dtypes(cases: Sequence[GpuCase], dtypes: Sequence[str]) -> list[GpuCase]:
    return [replace(case, dtype=dtype) for dtype in dtypes for case in cases]


SMALL = (
    _case("block", "1x5x7x20"),
    _case("attention", "2x4x9x36h2", masked=True),
    _case("efficient_attention", "1x3x11x16h2"),
)
"""For memcheck."""
INTERPRETED = (_case("block", "1x2x5x12"), *SMALL[1:])
"""For Triton's interpreter, which takes seconds for each."""
FLAGSHIP = (
    _case("attention", "1x65x67x100"),
    _case("mix_ffn_skip", "1x65x67x100"),
    _case("block", "1x129x129x100"),
)
CASES = (
    *FLAGSHIP,
    _case("attention", "2x33x31x64h2", masked=True),
    _case("attention", "1x32x32x160h5"),
    _case("attention", "1x16x16x256h8"),
    _case("attention", "1x16x16x256"),
    _case("efficient_attention", "2x40x41x128h2", masked=True),
    _case("efficient_attention", "1x129x129x100"),
    _case("mix_ffn_skip", "2x17x1x32"),
    _case("mix_ffn_skip", "1x14x14x512"),
    _case("mix_ffn", "1x64x64x64"),
    _case("batch_norm", "2x65x67x100"),
    _case("block", "1x64x64x32"),
)
FOLDED = in_dtypes((_case("attention", "1x65x67x100"),), ("bfloat16", "tf32"))
"""Self-attention in the folded form, which both of these dtypes get at this width."""

_BLOCK = _case("block", "1x257x257x100")
BLOCK_ROWS = in_dtypes((_BLOCK,), ("bfloat16", "tf32"))
TIMED = (
    *BLOCK_ROWS,
    *in_dtypes((_case("attention", "1x257x257x100"),), ("bfloat16", "tf32")),
    *in_dtypes((_case("mix_ffn_skip", "1x257x257x100"),), ("bfloat16", "tf32")),
    *(GpuCase("block", shape, "bfloat16", "training") for shape in SEGFORMER),
    replace(_BLOCK, dtype="float32"),
)
GRAPHS = in_dtypes((_case("block", "1x33x33x100"),), ("bfloat16", "tf32", "float32"))
"""The folded form, in bfloat16 and tf32, and the other one."""
REPEATED = in_dtypes((_BLOCK, _case("efficient_attention", "1x129x129x100")), ("bfloat16", "float32"))
