"""Tensors whose values lie more than 2^31 elements apart. The memory between them is never touched, so it costs
nothing; python -m tests.kernels.native.large has results that are that large."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator
from importlib import import_module

import pytest
import torch
from torch import Tensor

from msformer_kernels.core.operator import OPERATORS
from tests.kernels.cases import Tensors, cast, require, run

STRIDE = 2**31 + 64
NAMES = {
    "linear": "small",
    "batch_norm": "small",
    "efficient_attention": "cross",
    "efficient_self_attention": "norm_residual",
    "mix_ffn": "skip_norms",
}


@pytest.fixture(scope="module")
def space() -> Iterator[Tensor]:
    """Much room for float32, of which only what is written to exists."""
    if sys.platform != "linux" or sys.maxsize < 2**32:
        pytest.skip("needs memory that is not reserved")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        yield torch.frombuffer(mmap.mmap(-1, 4 * 15 * STRIDE, flags=flags), dtype=torch.float32)
    except OSError as error:
        pytest.skip(f"the system does not give the addresses: {error}")


def far_apart(x: Tensor, dim: int, space: Tensor) -> Tensor:
    """x with more than 2^31 elements between its values along `dim`."""
    others = [size if i != dim else 1 for i, size in enumerate(x.shape)]
    strides = list(torch.empty(others, device="meta").stride())
    strides[dim] = STRIDE
    found = space.as_strided(x.shape, strides)
    found.copy_(x.detach())
    return found.detach().requires_grad_()


@pytest.mark.parametrize("name", list(OPERATORS))
def test_values_more_than_two_to_the_31_apart(name: str, space: Tensor) -> None:
    """Along each dim of the first tensor, and of the gradient that comes in."""
    require("native")
    case = import_module(f"tests.kernels.cases.{name}").CASES[NAMES[name]]
    tensors: Tensors = cast(case.draw(), torch.float32)
    expected = run(case, tensors, "native")
    first = next(iter(tensors))
    x = tensors[first]
    assert x is not None
    for dim in (d for d in range(x.dim()) if 1 < x.shape[d] <= 14):
        found = run(case, tensors | {first: far_apart(x, dim, space)}, "native")
        for result, value in expected.items():
            torch.testing.assert_close(found[result], value, rtol=1e-5, atol=1e-5, msg=f"{result}, dim {dim}")
    outputs = case.call(tensors, "native")[:1]
    given = torch.randn_like(outputs[0])
    plain = torch.autograd.grad(outputs, x, given, retain_graph=True)[0]
    for dim in (d for d in range(given.dim()) if 1 < given.shape[d] <= 14):
        far = torch.autograd.grad(outputs, x, far_apart(given, dim, space).detach(), retain_graph=True)[0]
        torch.testing.assert_close(far, plain, rtol=1e-5, atol=1e-5, msg=f"gradient, dim {dim}")
