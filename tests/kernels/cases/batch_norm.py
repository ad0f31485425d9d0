"""Cases of `batch_norm`."""

from __future__ import annotations

from torch import Tensor

import msformer_kernels as kernels
from tests.kernels.cases.base import Case, Cases, Tensors, random, strided


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
        return {
            "x": strided(random(batch, tokens, channels) + 3, layout),
            "weight": random(channels) + 1 if affine else None,
            "bias": random(channels) if affine else None,
        }

    def call(tensors: Tensors, backend: str) -> tuple[Tensor, ...]:
        return kernels.batch_norm(**tensors, eps=eps, backend=backend)[:1]

    return Case(name, make, call)


CASES = Cases(
    small=[
        batch_norm_case("small"),
        batch_norm_case("plain", affine=False, eps=0.3),
        batch_norm_case("transposed", layout="transposed"),
        batch_norm_case("sliced", layout="sliced"),
        batch_norm_case("expanded", batch=3, layout="expanded"),
    ],
    medium=[
        batch_norm_case("tiles", tokens=301, channels=131),
    ],
    large=[
        batch_norm_case("columns", tokens=137, channels=37, layout="transposed"),
        batch_norm_case("long", batch=2, tokens=3001, channels=37),
    ],
)
