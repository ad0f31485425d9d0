"""The tests that every operator has: `class TestX(OperatorTests)` runs them on its cases (conftest.py hands them out).

The arguments `small`, `smooth`, `tiled` (small and medium), `large`, `any_native` and `empty` stand for cases.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from benchmarks.accuracy import MonteCarloArithmetic, Results, Rule, uncertainty
from msformer_kernels.core.operator import OPERATORS
from msformer_kernels.core.precision import float32_products
from tests.kernels.cases import Case, Cases, cast, require, run

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
DRAWS = {
    "native": {"f32": 6, "bf16": 4, "f16": 3},
    "cuda": {"f32": 3, "bf16": 2, "f16": 1},
    "triton": {"f32": 2, "bf16": 1, "f16": 1},
}
"""Of a small case; Triton's interpreter and the emulation of CUDA are slow."""
MANY = {"native": 48, "cuda": 48, "triton": 24}
"""After a bad verdict; of a medium case, which has many values, a third."""
EFFORT = float(os.environ.get("MSFORMER_TEST_EFFORT", "1"))
"""By how much the number of draws is multiplied."""


@lru_cache(maxsize=64)
def reference_results(
    case: Case,
    dtype: torch.dtype,
    seed: int,
    eager_mode: Callable[[], AbstractContextManager[Any]] = nullcontext,
    eps: float | None = None,
) -> tuple[Results, Results, Results]:
    """Of one draw: eager's results, the exact ones, and how far off these may be. Backends and their forms, which are
    tested one after the other, share them."""
    rounded = cast(case.draw(seed), dtype)
    with eager_mode():
        eager = run(case, rounded, "reference", seed=seed)
    dtypes = {name: x.dtype for name, x in eager.items()}
    wide = cast(rounded, torch.float64)

    def exact(tensors: dict[str, Tensor | None]) -> Results:
        return run(case, tensors, "reference", dtypes, seed)

    def perturbed(arithmetic: MonteCarloArithmetic) -> Results:
        inputs = {n: x if x is None else arithmetic.perturbed(x.detach()) for n, x in wide.items()}
        return exact({n: x if x is None or x.dtype == torch.bool else x.requires_grad_() for n, x in inputs.items()})

    truth = exact(wide)
    return eager, truth, uncertainty(perturbed, truth, eps or torch.finfo(dtype).eps)


def draw_once(
    case: Case,
    dtype: torch.dtype,
    backend: str,
    seed: int,
    rule: Rule,
    eager_mode: Callable[[], AbstractContextManager[Any]] = nullcontext,
    eps: float | None = None,
) -> None:
    """One draw of the error rule: ours, eager and the exact results, on the same rounded inputs.

    `eager_mode` is what eager runs in, `eps` the relative spacing of the values that operations round to, by default
    that of `dtype`.
    """
    ours = run(case, cast(case.draw(seed), dtype), backend, seed=seed)
    rule.add(ours, *reference_results(case, dtype, seed, eager_mode, eps))


def add_draw_of_precision(
    rule: Rule, case: Case, backend: str, precision: str, eager_mode: Any, eps: float, mode: Any = nullcontext
) -> None:
    """One draw of the error rule against eager in a mode of its own, whose results may be rounded further; `mode` is
    ours."""
    seed = rule.draws
    eager, exact, spread = reference_results(case, torch.float32, seed, eager_mode, eps)
    rounding = {name: x.dtype for name, x in eager.items()}  # of the gradients that come in
    with float32_products(precision), mode():
        ours = run(case, cast(case.draw(seed), torch.float32), backend, rounding, seed)
    rule.add(*({name: x.float() for name, x in found.items()} for found in (ours, eager)), exact, spread)


def check_error_rule(case: Case, dtype: str, backend: str, most: int = 100, medium: bool = False) -> None:
    """Raises AssertionError where the rule is broken (see `benchmarks.accuracy`).

    A verdict after few draws, at most `most`, may be bad luck; so a bad one counts only if it stands after more, and
    after many more.
    """
    rule = Rule()
    few = max(1, min(most, round(EFFORT * DRAWS[backend][dtype])))
    for count in (few, 4 * few, max(4 * few, MANY[backend] // (3 if medium else 1))):
        while rule.draws < count:
            draw_once(case, DTYPES[dtype], backend, rule.draws, rule)
        if not rule.faults():
            return
    raise AssertionError("\n".join(rule.faults()))


def check_float64(case: Case, backend: str) -> None:
    """Raises AssertionError where results in float64 are not those of the reference."""
    tensors = cast(case.draw(), torch.float64)
    expected, found = run(case, tensors, "reference"), run(case, tensors, backend)
    for name, value in expected.items():
        scale = max(1.0, value.abs().max().item()) if value.numel() else 1.0
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12 * scale, msg=lambda m, n=name: f"{n}: {m}")


def skip_in_the_interpreter(backend: str, dtype: str, medium: bool) -> None:
    """It is slow, and float16 takes the same way as bfloat16, which few cases show."""
    if (backend, dtype, medium) == ("triton", "f16", False):
        pytest.skip("float16 in the interpreter is for the medium cases")


@pytest.mark.usefixtures("poisoned")
class OperatorTests:
    OPERATOR: ClassVar[str]
    CASES: ClassVar[Cases]

    @pytest.mark.accuracy
    @pytest.mark.parametrize("dtype", list(DTYPES))
    def test_error_rule(self, tiled: Case, dtype: str, backend: str) -> None:
        medium = tiled in self.CASES.medium
        skip_in_the_interpreter(backend, dtype, medium)
        check_error_rule(tiled, dtype, backend, most=6 if medium else 100, medium=medium)

    @pytest.mark.accuracy
    @pytest.mark.parametrize("dtype", list(DTYPES))
    def test_error_rule_of_large_inputs(self, large: Case, dtype: str, float64_backend: str) -> None:
        check_error_rule(large, dtype, float64_backend, most=3)

    @pytest.mark.accuracy
    def test_float64_agrees_with_the_reference(self, any_native: Case, float64_backend: str) -> None:
        check_float64(any_native, float64_backend)

    def test_empty_inputs(self, empty: Case, backend: str) -> None:
        tensors = cast(empty.draw(), torch.float32)
        expected, found = run(empty, tensors, "reference"), run(empty, tensors, backend)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{n}: {m}")

    def test_gradcheck(self, smooth: Case, float64_backend: str) -> None:
        """The compiled backward in float64, against differences of the compiled forward."""
        tensors = cast(smooth.draw(), torch.float64)
        names = [name for name, x in tensors.items() if x is not None and x.requires_grad]

        def call(*leaves: Tensor) -> tuple[Tensor, ...]:
            return smooth.call(tensors | dict(zip(names, leaves, strict=True)), float64_backend)

        assert torch.autograd.gradcheck(call, [tensors[name] for name in names], fast_mode=True, atol=1e-6)

    @pytest.mark.parametrize("dtype", ["f32", "bf16"])
    def test_same_bits_on_any_number_of_threads(
        self, large: Case, dtype: str, float64_backend: str, threads: None
    ) -> None:
        tensors = cast(large.draw(), DTYPES[dtype])
        torch.set_num_threads(1)
        expected = run(large, tensors, float64_backend)
        for count in (2, 3, 2, 7, 2):
            torch.set_num_threads(count)
            for name, found in run(large, tensors, float64_backend).items():
                assert torch.equal(found, expected[name]), (name, count)

    def test_same_bits_in_every_run(self, tiled: Case, backend: str) -> None:
        if backend == "triton":
            pytest.skip("the interpreter runs one program after the other")
        tensors = cast(tiled.draw(), torch.float32)
        expected, found = run(tiled, tensors, backend), run(tiled, tensors, backend)
        for name, value in expected.items():
            assert torch.equal(found[name], value), name

    def test_inputs_are_never_written(self, small: Case, backend: str) -> None:
        tensors = cast(small.draw(), torch.float32)
        before = {n: x.detach().clone() for n, x in tensors.items() if x is not None}
        versions = {n: x._version for n, x in tensors.items() if x is not None}
        run(small, tensors, backend)
        for name, x in before.items():
            now = tensors[name]
            assert now is not None
            assert torch.equal(now.detach(), x), name
            assert now._version == versions[name], name

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    def test_nan_and_infinity_come_out_where_they_would_in_pytorch(
        self, special: Case, bad: float, backend: str
    ) -> None:
        tensors = special.draw()
        first = next(iter(tensors.values()))
        assert first is not None
        first[0, ..., 2, 1] = bad
        leaves = cast(tensors, torch.float32)
        expected, found = run(special, leaves, "reference"), run(special, leaves, backend)
        for name in (n for n in expected if n.startswith("output")):
            assert torch.equal(found[name].isnan(), expected[name].isnan()), name
            finite = expected[name].isfinite()
            torch.testing.assert_close(found[name][finite], expected[name][finite], rtol=1e-4, atol=1e-4)
        for name in (n for n in expected if n.startswith("grad")):
            assert name == "grad_key_bias" or not found[name][expected[name].isnan()].isfinite().any(), name

    @pytest.mark.parametrize("name", ["native", "reference"])
    def test_second_derivatives_and_transforms(self, special: Case, name: str) -> None:
        """Against differences of first derivatives and of the forward: a backward of the backward, tangents, and both
        under `torch.func.vmap`."""
        require(name)
        if "relu" in str(special):
            pytest.skip("a ReLU has no second derivative at its kink, which differences may straddle")
        tensors = cast(special.draw(), torch.float64)
        # a gradient that is always zero has no derivative, which gradgradcheck does not expect
        zero = OPERATORS[self.OPERATOR].zero_gradient
        names = [n for n, x in tensors.items() if x is not None and x.requires_grad and n not in zero]

        def call(*leaves: Tensor) -> tuple[Tensor, ...]:
            found = special.call(tensors | dict(zip(names, leaves, strict=True)), name)
            return found[: len(OPERATORS[self.OPERATOR].outputs)]

        leaves = [tensors[n] for n in names]
        assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True, atol=1e-5)
        assert torch.autograd.gradcheck(
            call,
            leaves,
            fast_mode=True,
            atol=1e-6,
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
        )
