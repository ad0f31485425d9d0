"""Products of tf32: tensor cores cut their operands off, the kernels round them first.

The interpreter multiplies in full float32; here its products cut operands off as tensor cores do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.accuracy import Rule
from tests.kernels.cases import Case, require
from tests.kernels.cases.efficient_attention import CASES as ATTENTION
from tests.kernels.cases.efficient_self_attention import CASES as SELF_ATTENTION
from tests.kernels.ops.shared import draw_once

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from msformer_kernels.core.precision import float32_products
from msformer_kernels.triton.tiles import round_to_tf32

TF32_EPS = 2.0**-10
RATIO = 1.7
"""How many times eager's error is allowed. The folded form has one product more in a row than eager; operands that are
cut off have 3 to 5 times eager's error."""


class RoundedProducts(TorchDispatchMode):
    """Within it matrix products round their operands to the nearest of tf32's values, as the vendor's libraries do."""

    PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.PRODUCTS:
            *added, left, right = args
            args = (*added, nearest_tf32(left), nearest_tf32(right))
        return func(*args, **(kwargs or {}))


def nearest_tf32(x: Tensor) -> Tensor:
    """By Dekker's splitting: x with 11 significant bits."""
    scaled = x * 8193.0
    return scaled - (scaled - x)


@pytest.fixture
def cut_off(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Within it the interpreter's tf32 products cut operands off; the list has an entry for each product."""
    require("triton")
    products: list[int] = []
    multiply = InterpreterBuilder.create_dot

    def cut(x: Any) -> Any:
        return TensorHandle((x.data.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32), x.dtype)

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, *rest: Any) -> Any:
        if input_precision == ir.INPUT_PRECISION.TF32:
            products.append(1)
            a, b = cut(a), cut(b)
        return multiply(self, a, b, d, input_precision, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    with float32_products("high"):
        yield products


TF32_CASES = [SELF_ATTENTION["tiles"], SELF_ATTENTION["norm_residual"], ATTENTION["cross"]]


@pytest.mark.accuracy
@pytest.mark.parametrize("case", TF32_CASES, ids=str)
def test_products_have_the_error_of_rounded_operands(case: Case, cut_off: list[int]) -> None:
    rule = Rule()
    for seed in range(2 if case.name == "tiles" else 6):
        draw_once(case, torch.float32, "triton", seed, rule, eager_mode=RoundedProducts, eps=TF32_EPS)
    assert cut_off
    for name, comparison in rule.comparisons.items():
        assert comparison.ratio <= RATIO + 2 / comparison.values**0.5, (name, comparison.ratio)


@triton.jit
def rounding_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, round_to_tf32(tl.load(x_ptr + at)))


def test_rounding_to_tf32() -> None:
    require("triton")
    step = 2.0**-10
    bits = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)  # three NaN
    x = torch.tensor(
        [1 + 0.49 * step, 1 + 0.51 * step, -1 - 0.51 * step, float("inf"), -float("inf"), 0.0, -0.0, 3.4028235e38]
    )
    found = torch.empty(16)
    rounding_kernel[(1,)](torch.cat([x, bits, x[:5]]), found, 16)
    inf = float("inf")
    assert found[:8].tolist() == [1.0, 1 + step, -1 - step, inf, -inf, 0.0, 0.0, inf]
    assert found[8:11].isnan().all()
