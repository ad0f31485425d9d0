"""Cases of `efficient_self_attention`."""

from __future__ import annotations

from torch import Tensor

import msformer_kernels as kernels
from tests.kernels.cases.base import Case, Cases, Tensors, random, random_mask, strided


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
    norm_kind: str = "layer",
    memory: int | None = None,
) -> Case:
    def of_memory() -> Tensors:
        if memory is None:
            return {}
        sizes = {"memory_key": key_channels, "memory_value": value_channels}
        return {name: strided(random(heads, memory, size // heads), layout) for name, size in sizes.items()}

    def make() -> Tensors:
        scale = channels**-0.5
        bias = (lambda n: random(n)) if biases else (lambda n: None)
        return {
            "x": strided(random(batch, tokens, channels), layout),
            "query_weight": random(key_channels, channels, scale=2 * scale),
            "query_bias": bias(key_channels),
            "key_weight": random(key_channels, channels, scale=2 * scale),
            "key_bias": bias(key_channels) if memory is None else None,
            "value_weight": random(value_channels, channels, scale=scale),
            "value_bias": bias(value_channels),
            "output_weight": random(channels, value_channels, scale=scale),
            "output_bias": bias(channels),
            "norm_weight": random(channels) + 1 if norm else None,
            "norm_bias": bias(channels) if norm else None,
            "mask": random_mask(mask, batch, tokens),
            **of_memory(),
        }

    def call(tensors: Tensors, backend: str) -> tuple[Tensor, ...]:
        options = {"num_heads": heads, "residual": residual, "norm_eps": norm_eps, "norm_kind": norm_kind}
        return kernels.efficient_self_attention(**tensors, **options, backend=backend)

    return Case(name, make, call)


CASES = Cases(
    small=[
        self_attention_case("one", batch=1, tokens=1, channels=1, key_channels=1, value_channels=1, norm=False),
        self_attention_case("norm_residual"),
        self_attention_case("bare", norm=False, residual=False, biases=False),
        self_attention_case("heads", channels=10, key_channels=15, value_channels=20, heads=5, norm=False),
        self_attention_case("masked", batch=3, heads=2, key_channels=4, value_channels=8, mask="one_image_masked"),
        self_attention_case("transposed", layout="transposed"),
        self_attention_case("sliced", layout="sliced", residual=False),
        self_attention_case("expanded", batch=3, layout="expanded"),
        self_attention_case("norm_eps", norm_eps=0.3),
        self_attention_case("images", batch=9, tokens=5, key_channels=12, value_channels=10, heads=2),
    ],
    medium=[
        self_attention_case("tiles", batch=1, tokens=301, channels=36, key_channels=70, value_channels=44, heads=2),
    ],
    large=[
        self_attention_case("columns", batch=1, tokens=137, channels=37, layout="transposed"),
        self_attention_case("long", batch=1, tokens=1201, channels=100, key_channels=100, value_channels=100),
        self_attention_case(
            "heads_long", tokens=500, channels=64, key_channels=40, value_channels=80, heads=4, mask="random"
        ),
        self_attention_case("groups", batch=5, tokens=400, channels=40, key_channels=24, value_channels=40, heads=2),
        self_attention_case("rms_norm", norm_kind="rms", norm_eps=0.2),
        self_attention_case("memory", batch=3, heads=2, layout="transposed", mask="one_image_masked", memory=4),
        self_attention_case(
            "memory_long",
            tokens=400,
            channels=40,
            key_channels=24,
            value_channels=20,
            heads=4,
            norm_kind="rms",
            mask="random",
            layout="transposed",
            memory=5,
        ),
        self_attention_case("few_tokens", tokens=9, channels=100, key_channels=66, value_channels=130, heads=2),
        self_attention_case("memory_groups", batch=5, tokens=400, channels=12, heads=2, memory=2),
    ],
    empty=[
        self_attention_case("empty_batch", batch=0),
        self_attention_case("no_tokens", tokens=0),
    ],
)
