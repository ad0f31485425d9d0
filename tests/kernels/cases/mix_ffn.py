"""Cases of `mix_ffn`."""

from __future__ import annotations

from torch import Tensor

import msformer_kernels as kernels
from tests.kernels.cases.base import Case, Cases, Tensors, random, strided


def mix_ffn_case(
    name: str,
    batch: int = 1,
    height: int = 5,
    width: int = 7,
    channels: int = 6,
    hidden: int = 10,
    kernel_size: int = 3,
    hidden_norm: bool = True,
    norm: bool = True,
    biases: bool = True,
    layout: str = "contiguous",
    skip: bool = True,
    activation: str = "gelu",
    inner_activation: str = "identity",
    residual: bool = True,
    gated: bool = False,
    norm_eps: float = 1e-5,
) -> Case:
    def make() -> Tensors:
        bias = (lambda n: random(n)) if biases else (lambda n: None)
        return {
            "x": strided(random(batch, height * width, channels), layout),
            "fc1_weight": random(hidden, channels, scale=channels**-0.5),
            "fc1_bias": bias(hidden),
            "dw_weight": random(hidden, 1, kernel_size, kernel_size, scale=1.5 / kernel_size),
            "dw_bias": bias(hidden),
            "fc2_weight": random(channels, hidden // 2 if gated else hidden, scale=max(1, hidden) ** -0.5),
            "fc2_bias": bias(channels),
            "hidden_norm_weight": random(hidden) + 1 if hidden_norm else None,
            "hidden_norm_bias": bias(hidden) if hidden_norm else None,
            "norm_weight": random(channels) + 1 if norm else None,
            "norm_bias": bias(channels) if norm else None,
        }

    def call(tensors: Tensors, backend: str) -> tuple[Tensor, ...]:
        options = {
            "skip": skip,
            "activation": activation,
            "inner_activation": inner_activation,
            "residual": residual,
            "gated": gated,
            "norm_eps": norm_eps,
            "backend": backend,
        }
        return (kernels.mix_ffn(height=height, width=width, **tensors, **options),)

    return Case(name, make, call)


CASES = Cases(
    small=[
        mix_ffn_case("one", height=1, width=1, channels=1, hidden=3),
        mix_ffn_case("skip_norms", batch=2),
        mix_ffn_case("segformer", skip=False, hidden_norm=False, residual=False),
        mix_ffn_case("bare", norm=False, hidden_norm=False, biases=False, skip=False, residual=False),
        mix_ffn_case("tanh", activation="gelu_tanh", hidden=16),
        mix_ffn_case("relu", activation="relu", norm=False, hidden_norm=False, skip=False),
        mix_ffn_case("relu_skip", activation="relu", norm=False, hidden_norm=False),
        mix_ffn_case("silu", activation="silu", hidden_norm=False),
        mix_ffn_case("hardswish", activation="hardswish", skip=False),
        mix_ffn_case("relu6", activation="relu6", hidden_norm=False, skip=False),
        mix_ffn_case("row", height=1, width=40, skip=False),
        mix_ffn_case("column", height=19, width=1),
        mix_ffn_case("transposed", layout="transposed"),
        mix_ffn_case("sliced", layout="sliced"),
        mix_ffn_case("expanded", batch=2, layout="expanded"),
        mix_ffn_case("norm_eps", norm_eps=0.3),
        mix_ffn_case("hidden_norm_eps", norm_eps=0.3, norm=False),
    ],
    medium=[
        mix_ffn_case("tiles", height=9, width=37, channels=12, hidden=70),
        mix_ffn_case("tiles_plain", height=9, width=37, channels=12, hidden=70, skip=False, hidden_norm=False),
    ],
    large=[
        mix_ffn_case("inner", height=9, width=13, channels=37, hidden=50, inner_activation="gelu"),
        mix_ffn_case(
            "inner_plain",
            batch=2,
            width=80,
            hidden=21,
            inner_activation="silu",
            activation="identity",
            skip=False,
            hidden_norm=False,
        ),
        mix_ffn_case("few_tokens", height=3, width=4, channels=70, hidden=130),
        # bands, strips, and images that are smaller than the convolution
        mix_ffn_case("five", height=28, width=9, channels=9, hidden=18, kernel_size=5),
        mix_ffn_case(
            "seven", height=6, width=71, channels=9, hidden=9, kernel_size=7, skip=False, inner_activation="silu"
        ),
        mix_ffn_case("seven_small", batch=3, height=2, width=5, kernel_size=7, hidden_norm=False, layout="transposed"),
        # halves of whole vectors, and others
        mix_ffn_case(
            "gated", width=72, hidden=64, hidden_norm=False, gated=True, inner_activation="silu", activation="silu"
        ),
        mix_ffn_case(
            "gated_odd", batch=2, hidden=22, kernel_size=5, hidden_norm=False, gated=True, biases=False, skip=False
        ),
        mix_ffn_case("columns", height=9, width=13, channels=37, hidden=50, layout="transposed"),
        mix_ffn_case("large", height=71, width=79, channels=20, hidden=80),
        mix_ffn_case("wide", batch=2, height=9, width=150, channels=33, hidden=130, skip=False, hidden_norm=False),
        mix_ffn_case("slices", batch=3, height=20, width=20, channels=13, hidden=203, hidden_norm=False),
        mix_ffn_case("groups", batch=5, height=21, width=23, channels=20, hidden=40),
    ],
    empty=[
        mix_ffn_case("empty_batch", batch=0),
        mix_ffn_case("no_rows", height=0),
        mix_ffn_case("no_columns", width=0),
    ],
)
