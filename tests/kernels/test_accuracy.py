"""Compiled backends against the reference: in float64 to rounding, in lower precision by the rule

    our error <= 2 x the error of eager PyTorch in the same dtype + 2 ulp of the largest value,

both against the reference in float64 on the same (rounded) inputs, for outputs and every gradient.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import msformer_kernels as kernels
from tests.kernels.cases import EMPTY, LARGE, MEDIUM, SMALL, Case, cast, run

pytestmark = pytest.mark.usefixtures("poisoned")


def check_rule(ours: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert ours.keys() == truth.keys()
    for name, expected in truth.items():
        found = ours[name]
        assert found.dtype == eager[name].dtype, name
        assert found.shape == expected.shape, name
        if expected.numel() == 0:
            continue
        error = (found.double() - expected).abs().max().item()
        allowed = (eager[name].double() - expected).abs().max().item()
        ulp = torch.finfo(found.dtype).eps * expected.abs().max().item()
        assert error <= 2 * allowed + 2 * ulp + torch.finfo(found.dtype).tiny, (
            f"{name}: error {error:.3g}, eager {allowed:.3g}, ulp {ulp:.3g}"
        )


@pytest.mark.parametrize("case", [*SMALL, *LARGE, *EMPTY], ids=str)
def test_float64_agrees_with_the_reference(case: Case, float64_backend: str) -> None:
    tensors = cast(case.make(), torch.float64)
    expected, found = run(case, tensors, "reference"), run(case, tensors, float64_backend)
    for name, value in expected.items():
        scale = max(1.0, value.abs().max().item()) if value.numel() else 1.0
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("case", [*SMALL, *MEDIUM], ids=str)
def test_error_rule(case: Case, dtype: torch.dtype, backend: str) -> None:
    check_error_rule(case, dtype, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("case", [c for c in (*SMALL, *MEDIUM, *EMPTY) if c.name.startswith("self")], ids=str)
def test_error_rule_of_the_unfolded_form(case: Case, dtype: torch.dtype, unfolded_backend: str) -> None:
    check_error_rule(case, dtype, unfolded_backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_error_rule_of_large_inputs(case: Case, dtype: torch.dtype, float64_backend: str) -> None:
    check_error_rule(case, dtype, float64_backend)


@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_empty_inputs(case: Case, backend: str) -> None:
    check_error_rule(case, torch.float32, backend)


def check_error_rule(case: Case, dtype: torch.dtype, backend: str) -> None:
    rounded = cast(case.make(), dtype)
    eager, ours = run(case, rounded, "reference"), run(case, rounded, backend)
    # float64 on the rounded inputs, with output gradients rounded to the dtypes of the outputs
    truth = run(case, cast(rounded, torch.float64), "reference", {n: x.dtype for n, x in ours.items()})
    check_rule(ours, eager, truth)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_activation_over_its_whole_range(activation: str, backend: str) -> None:
    """Through an operator that only applies the activation: identity linears, a centre tap of one."""
    x = torch.cat([torch.linspace(-14, 14, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 60.0, -60.0])]).view(1, -1, 1)
    one, tap = torch.ones(1, 1), torch.zeros(1, 1, 3, 3)
    tap[..., 1, 1] = 1

    def apply(x: Tensor, name: str) -> Tensor:
        weights = [w.to(x.dtype) for w in (one, tap, one)]
        arguments = (t for w in weights for t in (w, None))
        return kernels.mix_ffn(x, 1, x.shape[1], *arguments, activation=activation, backend=name)

    def value_and_slope(dtype: torch.dtype, name: str) -> dict[str, Tensor]:
        leaf = x.to(dtype).requires_grad_()
        output = apply(leaf, name)
        return {"value": output.detach(), "slope": torch.autograd.grad(output.sum(), leaf)[0]}

    ours, eager = value_and_slope(torch.float32, backend), value_and_slope(torch.float32, "reference")
    check_rule(ours, eager, value_and_slope(torch.float64, "reference"))
