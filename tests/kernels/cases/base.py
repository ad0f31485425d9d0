"""What every test of the operators is made of: inputs of every shape, option and memory layout, by name.

A case makes float64 tensors by name and calls an operator with them; tests cast them, differentiate by them, and
compare backends.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import msformer_kernels as kernels
from msformer_kernels.core.operator import OPERATORS

Tensors = dict[str, Tensor | None]
BASE_SEED = 1000 * int(os.environ.get("MSFORMER_TEST_SEED", "0"))
"""All random inputs depend on it; the tests hold for any."""


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], Tensors]
    call: Callable[[Tensors, str], tuple[Tensor, ...]]

    def __str__(self) -> str:
        return self.name

    def draw(self, seed: int = 0) -> Tensors:
        """The inputs of this seed, float64."""
        torch.manual_seed(BASE_SEED + seed)
        return self.make()


class Cases:
    """The cases of one operator, by name: small ones for every test; medium ones have several tiles and splits of the
    Triton kernels, large ones several chunks, strips, bands and panels of the CPU kernels, with remainders everywhere.
    """

    def __init__(
        self, small: Sequence[Case], medium: Sequence[Case] = (), large: Sequence[Case] = (), empty: Sequence[Case] = ()
    ) -> None:
        self.small, self.medium, self.large, self.empty = tuple(small), tuple(medium), tuple(large), tuple(empty)
        every = (*small, *medium, *large, *empty)
        self._by_name = {case.name: case for case in every}
        assert len(self._by_name) == len(every), "two cases of one name"

    def __getitem__(self, name: str) -> Case:
        return self._by_name[name]


def require(backend: str, operator: str | None = None) -> None:
    """Skips the test where a backend was not built, or does not have the operator; fails it where it must be there
    (MSFORMER_REQUIRE_NATIVE=1)."""
    if operator and backend not in OPERATORS[operator].served_by:
        pytest.skip(f"{backend} has no kernels for {operator}")
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


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) * scale


def random_mask(kind: str | None, batch: int, tokens: int) -> Tensor | None:
    if kind is None:
        return None
    mask = torch.rand(batch, tokens) > 0.4
    if tokens:
        mask[:, tokens // 2] = True
    if kind == "one_image_masked":
        mask[0] = False
    return mask


def cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Floating-point tensors in another dtype, as differentiable leaves, in the same memory layout."""
    return {
        name: x if x is None or not x.is_floating_point() else _cast_strided(x, dtype).requires_grad_()
        for name, x in tensors.items()
    }


def _cast_strided(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.numel() == 0 or (x.is_contiguous() and x.storage_offset() == 0):
        return x.detach().to(dtype)
    size = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    storage = torch.full((x.storage_offset() + size,), float("nan"), dtype=dtype)
    out = storage.as_strided(x.shape, x.stride(), x.storage_offset())
    # an expanded dimension holds one slice
    first = tuple(slice(0, 1) if s == 0 else slice(None) for s in x.stride())
    out[first] = x.detach()[first].to(dtype)
    return out


def run(
    case: Case,
    tensors: Tensors,
    backend: str,
    rounding: dict[str, torch.dtype] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Outputs and the gradients of every differentiable input, by name.

    The gradients of the outputs are the pseudo-random numbers of the seed, rounded to the dtype of each output, or
    to that which `rounding` gives for its name.
    """
    outputs = case.call(tensors, backend)
    found = {f"output{i}": o.detach() for i, o in enumerate(outputs)}
    generator = torch.Generator().manual_seed(BASE_SEED + 1 + seed)
    given = [
        torch.randn(o.shape, dtype=torch.float64, generator=generator).to((rounding or {}).get(n, o.dtype)).to(o.dtype)
        for n, o in found.items()
    ]
    inputs = {name: x for name, x in tensors.items() if x is not None and x.requires_grad}
    gradients = torch.autograd.grad(outputs, list(inputs.values()), given, allow_unused=True)
    for (name, x), gradient in zip(inputs.items(), gradients, strict=True):
        found[f"grad_{name}"] = torch.zeros_like(x) if gradient is None else gradient
    return found
