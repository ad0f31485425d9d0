"""Cases of `linear`."""

from __future__ import annotations

from torch import Tensor

import msformer_kernels as kernels
from tests.kernels.cases.base import Case, Cases, Tensors, random, strided


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
        return {
            "x": strided(random(batch, tokens, channels), layout),
            "weight": random(out, channels, scale=max(1, channels) ** -0.5),
            "bias": random(out) if bias else None,
        }

    def call(tensors: Tensors, backend: str) -> tuple[Tensor, ...]:
        return (kernels.linear(**tensors, backend=backend),)

    return Case(name, make, call)


CASES = Cases(
    small=[
        linear_case("small"),
        linear_case("one", batch=1, tokens=1, channels=1, out=1),
        linear_case("transposed", bias=False, layout="transposed"),
        linear_case("sliced", layout="sliced"),
        linear_case("expanded", batch=3, layout="expanded"),
    ],
    large=[
        linear_case("columns", tokens=137, channels=37, layout="transposed"),
        linear_case("many_tokens", batch=2, tokens=2501, channels=33, out=150),
        linear_case("many_features", batch=1, tokens=20, channels=5003, out=21),
    ],
    empty=[
        linear_case("no_features", tokens=1201, channels=0),
        linear_case("no_outputs", channels=2503, out=0),
        linear_case("no_tokens", tokens=0),
        linear_case("empty_batch", batch=0),
    ],
)
