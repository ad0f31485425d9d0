"""Inputs that every backend must serve: shapes from tiny to odd, every option, every memory layout.

A case makes float64 tensors by name and calls an operator with them; tests cast them, differentiate by them, and
compare backends.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import msformer_kernels as kernels

Tensors = dict[str, Tensor | None]


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], Tensors]
    call: Callable[[Tensors, str], tuple[Tensor, ...]]

    def __str__(self) -> str:
        return self.name


def require(backend: str) -> None:
    """Skips the test where a backend was not built; fails it where it must be there (MSFORMER_REQUIRE_NATIVE=1)."""
    if backend in kernels.available_backends():
        return
    reason = f"backend {backend} is not available: {kernels.explain().reasons[backend]}"
    if os.environ.get("MSFORMER_REQUIRE_NATIVE") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def strided(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "contiguous":
        return x
    if layout == "transposed":  # the last two dims swapped in memory, as tokens of a channels-first image
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":  # every other channel of a wider tensor, with an offset
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), float("nan"), dtype=x.dtype)
        wide[..., 3::2] = x
        return wide[..., 3::2]
    if layout == "expanded":  # one image for the whole batch
        return x[:1].expand_as(x)
    raise ValueError(layout)


def _random(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) * scale


def _mask(kind: str | None, batch: int, tokens: int) -> Tensor | None:
    if kind is None:
        return None
    mask = torch.rand(batch, tokens) > 0.4
    if tokens:
        mask[:, tokens // 2] = True
    if kind == "one_image_masked":
        mask[0] = False
    return mask


def attention_case(
    name: str,
    batch: int = 1,
    heads: int = 1,
    query_tokens: int = 7,
    tokens: int = 9,
    key_channels: int = 5,
    value_channels: int = 6,
    mask: str | None = None,
    layout: str = "contiguous",
    **options: object,
) -> Case:
    def make() -> Tensors:
        torch.manual_seed(0)
        return {
            "query": strided(_random(batch, heads, query_tokens, key_channels, scale=2), layout),
            "key": strided(_random(batch, heads, tokens, key_channels, scale=2), layout),
            "value": strided(_random(batch, heads, tokens, value_channels), layout),
            "mask": _mask(mask, batch, tokens),
        }

    def call(tensors: Tensors, backend: str) -> tuple[Tensor, ...]:
        return kernels.efficient_attention(**tensors, **options, backend=backend)

    return Case(f"attention-{name}", make, call)


def self_attention_case(
    name: str,
    batch: int = 2,
    tokens: int = 11,
    channels: int = 6,
    key_channels: int = 6,
    value_channels: int = 6,
    heads: int = 1,
    norm: bool = True,
    residual: bool = True,
    biases: bool = True,
    mask: str | None = None,
    layout: str = "contiguous",
    norm_eps: float = 1e-5,
) -> Case:
    def make() -> Tensors:
        torch.manual_seed(0)
        scale = channels**-0.5
        bias = (lambda n: _random(n)) if biases else (lambda n: None)
        return {
            "x": strided(_random(batch, tokens, channels), layout),
            "query_weight": _random(key_channels, channels, scale=2 * scale),
            "query_bias": bias(key_channels),
            "key_weight": _random(key_channels, channels, scale=2 * scale),
            "key_bias": bias(key_channels),
            "value_weight": _random(value_channels, channels, scale=scale),
            "value_bias": bias(value_channels),
            "output_weight": _random(channels, value_channels, scale=scale),
            "output_bias": bias(channels),
            "norm_weight": _random(channels) + 1 if norm else None,
            "norm_bias": bias(channels) if norm else None,
            "mask": _mask(mask, batch, tokens),
        }

    def call(tensors: Tensors, backend: str) -> tuple[Tensor, ...]:
        options = {"num_heads": heads, "residual": residual, "norm_eps": norm_eps, "backend": backend}
        return kernels.efficient_self_attention(**tensors, **options)

    return Case(f"self_attention-{name}", make, call)


def mix_ffn_case(
    name: str,
    batch: int = 1,
    height: int = 5,
    width: int = 7,
    channels: int = 6,
    hidden: int = 10,
    hidden_norm: bool = True,
    norm: bool = True,
    biases: bool = True,
    layout: str = "contiguous",
    skip: bool = True,
    activation: str = "gelu",
    residual: bool = True,
    norm_eps: float = 1e-5,
) -> Case:
    def make() -> Tensors:
        torch.manual_seed(0)
        bias = (lambda n: _random(n)) if biases else (lambda n: None)
        return {
            "x": strided(_random(batch, height * width, channels), layout),
            "fc1_weight": _random(hidden, channels, scale=channels**-0.5),
            "fc1_bias": bias(hidden),
            "dw_weight": _random(hidden, 1, 3, 3, scale=0.5),
            "dw_bias": bias(hidden),
            "fc2_weight": _random(channels, hidden, scale=hidden**-0.5),
            "fc2_bias": bias(channels),
            "hidden_norm_weight": _random(hidden) + 1 if hidden_norm else None,
            "hidden_norm_bias": bias(hidden) if hidden_norm else None,
            "norm_weight": _random(channels) + 1 if norm else None,
            "norm_bias": bias(channels) if norm else None,
        }

    def call(tensors: Tensors, backend: str) -> tuple[Tensor, ...]:
        options = {
            "skip": skip,
            "activation": activation,
            "residual": residual,
            "norm_eps": norm_eps,
            "backend": backend,
        }
        return (kernels.mix_ffn(height=height, width=width, **tensors, **options),)

    return Case(f"mix_ffn-{name}", make, call)


def linear_case(
    name: str,
    batch: int = 2,
    tokens: int = 7,
    channels: int = 6,
    out: int = 5,
    bias: bool = True,
    layout: str = "contiguous",
) -> Case:
    def make() -> Tensors:
        torch.manual_seed(0)
        return {
            "x": strided(_random(batch, tokens, channels), layout),
            "weight": _random(out, channels, scale=channels**-0.5),
            "bias": _random(out) if bias else None,
        }

    def call(tensors: Tensors, backend: str) -> tuple[Tensor, ...]:
        return (kernels.linear(**tensors, backend=backend),)

    return Case(f"linear-{name}", make, call)


def batch_norm_case(
    name: str,
    batch: int = 2,
    tokens: int = 7,
    channels: int = 6,
    affine: bool = True,
    layout: str = "contiguous",
    eps: float = 1e-5,
) -> Case:
    def make() -> Tensors:
        torch.manual_seed(0)
        return {
            "x": strided(_random(batch, tokens, channels) + 3, layout),
            "weight": _random(channels) + 1 if affine else None,
            "bias": _random(channels) if affine else None,
        }

    def call(tensors: Tensors, backend: str) -> tuple[Tensor, ...]:
        return kernels.batch_norm(**tensors, eps=eps, backend=backend)[:1]

    return Case(f"batch_norm-{name}", make, call)


SMALL = [
    attention_case("one", query_tokens=1, tokens=1, key_channels=1, value_channels=1),
    attention_case("cross", batch=2, heads=3, query_tokens=4, tokens=13, key_channels=5, value_channels=9),
    attention_case("masked", batch=3, heads=2, tokens=17, mask="random"),
    attention_case("all_masked", batch=2, heads=2, tokens=6, mask="one_image_masked"),
    attention_case("scales", batch=2, query_scale=0.7, key_scale=1.4, output_scale=0.3),
    attention_case("plain_query", normalize_query=False, mask="random"),
    attention_case("scaling", batch=2, heads=2, normalization="scaling", mask="one_image_masked", output_scale=2.0),
    attention_case("scaling_plain_query", normalization="scaling", normalize_query=False, key_scale=0.5),
    attention_case("transposed", batch=2, heads=2, layout="transposed"),
    attention_case("sliced", batch=2, heads=2, layout="sliced", mask="random"),
    attention_case("expanded", batch=3, heads=2, layout="expanded"),
    self_attention_case("one", batch=1, tokens=1, channels=1, key_channels=1, value_channels=1, norm=False),
    self_attention_case("norm_residual"),
    self_attention_case("bare", norm=False, residual=False, biases=False),
    self_attention_case("heads", channels=10, key_channels=15, value_channels=20, heads=5, norm=False),
    self_attention_case("masked", batch=3, heads=2, key_channels=4, value_channels=8, mask="one_image_masked"),
    self_attention_case("transposed", layout="transposed"),
    self_attention_case("sliced", layout="sliced", residual=False),
    self_attention_case("expanded", batch=3, layout="expanded"),
    mix_ffn_case("one", height=1, width=1, channels=1, hidden=3),
    mix_ffn_case("skip_norms", batch=2),
    mix_ffn_case("segformer", skip=False, hidden_norm=False, residual=False),
    mix_ffn_case("bare", norm=False, hidden_norm=False, biases=False, skip=False, residual=False),
    mix_ffn_case("tanh", activation="gelu_tanh", hidden=16),
    mix_ffn_case("relu", activation="relu", norm=False, hidden_norm=False),
    mix_ffn_case("row", height=1, width=40, skip=False),
    mix_ffn_case("column", height=19, width=1),
    mix_ffn_case("transposed", layout="transposed"),
    mix_ffn_case("sliced", layout="sliced"),
    mix_ffn_case("expanded", batch=2, layout="expanded"),
    self_attention_case("norm_eps", norm_eps=0.3),
    mix_ffn_case("norm_eps", norm_eps=0.3),
    mix_ffn_case("hidden_norm_eps", norm_eps=0.3, norm=False),
    linear_case("small"),
    linear_case("one", batch=1, tokens=1, channels=1, out=1),
    linear_case("transposed", bias=False, layout="transposed"),
    linear_case("sliced", layout="sliced"),
    linear_case("expanded", batch=3, layout="expanded"),
    batch_norm_case("small"),
    batch_norm_case("plain", affine=False, eps=0.3),
    batch_norm_case("transposed", layout="transposed"),
    batch_norm_case("sliced", layout="sliced"),
    batch_norm_case("expanded", batch=3, layout="expanded"),
]

# several tiles and splits of the Triton kernels, with remainders
MEDIUM = [
    attention_case("tiles", heads=2, query_tokens=75, tokens=170, key_channels=70, value_channels=66, mask="random"),
    self_attention_case("tiles", batch=1, tokens=301, channels=36, key_channels=70, value_channels=44, heads=2),
    mix_ffn_case("tiles", height=9, width=37, channels=12, hidden=70),
    mix_ffn_case("tiles_plain", height=9, width=37, channels=12, hidden=70, skip=False, hidden_norm=False),
    batch_norm_case("tiles", tokens=301, channels=131),
]

# several chunks, strips, bands and panels, with remainders everywhere
LARGE = [
    attention_case("long", heads=2, query_tokens=301, tokens=1003, key_channels=33, value_channels=20, mask="random"),
    attention_case(
        "scaling_long", query_tokens=7, tokens=700, key_channels=8, value_channels=70, normalization="scaling"
    ),
    self_attention_case("long", batch=1, tokens=1201, channels=100, key_channels=100, value_channels=100),
    self_attention_case(
        "heads_long", tokens=500, channels=64, key_channels=40, value_channels=80, heads=4, mask="random"
    ),
    mix_ffn_case("large", height=71, width=79, channels=20, hidden=80),
    mix_ffn_case("wide", batch=2, height=9, width=150, channels=33, hidden=130, skip=False, hidden_norm=False),
    mix_ffn_case("groups", batch=5, height=21, width=23, channels=20, hidden=40),
    self_attention_case("groups", batch=5, tokens=400, channels=40, key_channels=24, value_channels=40, heads=2),
    linear_case("many_tokens", batch=2, tokens=2501, channels=33, out=150),
    linear_case("many_features", batch=1, tokens=20, channels=5003, out=21),
    batch_norm_case("long", batch=2, tokens=3001, channels=37),
]

EMPTY = [
    attention_case("empty_batch", batch=0),
    attention_case("no_keys", tokens=0),
    attention_case("no_queries", query_tokens=0),
    self_attention_case("empty_batch", batch=0),
    self_attention_case("no_tokens", tokens=0),
    mix_ffn_case("empty_batch", batch=0),
    mix_ffn_case("no_rows", height=0),
    mix_ffn_case("no_columns", width=0),
]


def cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Floating-point tensors in another dtype, as differentiable leaves, in the same memory layout."""
    return {
        name: x if x is None or not x.is_floating_point() else _cast_strided(x, dtype).requires_grad_()
        for name, x in tensors.items()
    }


def _cast_strided(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.numel() == 0 or x.is_contiguous():
        return x.detach().to(dtype)
    size = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    storage = torch.full((size,), float("nan"), dtype=dtype)
    out = storage.as_strided(x.shape, x.stride())
    # an expanded dimension holds one slice
    first = tuple(slice(0, 1) if s == 0 else slice(None) for s in x.stride())
    out[first] = x.detach()[first].to(dtype)
    return out


def run(
    case: Case, tensors: Tensors, backend: str, rounding: dict[str, torch.dtype] | None = None
) -> dict[str, Tensor]:
    """Outputs and the gradients of every differentiable input, by name.

    The gradients of the outputs are the same pseudo-random numbers every time, rounded to the dtype of each output, or
    to that which `rounding` gives for its name.
    """
    outputs = case.call(tensors, backend)
    found = {f"output{i}": o.detach() for i, o in enumerate(outputs)}
    generator = torch.Generator().manual_seed(1)
    given = [
        torch.randn(o.shape, dtype=torch.float64, generator=generator).to((rounding or {}).get(n, o.dtype)).to(o.dtype)
        for n, o in found.items()
    ]
    inputs = {name: x for name, x in tensors.items() if x is not None and x.requires_grad}
    gradients = torch.autograd.grad(outputs, list(inputs.values()), given, allow_unused=True)
    for (name, x), gradient in zip(inputs.items(), gradients, strict=True):
        found[f"grad_{name}"] = torch.zeros_like(x) if gradient is None else gradient
    return found
