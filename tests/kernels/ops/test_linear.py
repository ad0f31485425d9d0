"""A linear layer of tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import msformer_kernels as kernels
from tests.kernels.cases.linear import CASES
from tests.kernels.ops.shared import OperatorTests


class TestLinear(OperatorTests):
    OPERATOR = "linear"
    CASES = CASES


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=["no_images", "no_tokens", "no_features"])
def test_linear_of_nothing(shape: tuple[int, int, int], float64_backend: str) -> None:
    x = torch.randn(*shape, requires_grad=True)
    weight, bias = torch.randn(5, shape[2], requires_grad=True), torch.randn(5, requires_grad=True)
    found, expected = kernels.linear(x, weight, bias, backend=float64_backend), F.linear(x, weight, bias)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found.sum(), (x, weight, bias))
    for a, b in zip(gradients, torch.autograd.grad(expected.sum(), (x, weight, bias)), strict=True):
        torch.testing.assert_close(a, b)


def test_an_input_without_gradient_gets_none(float64_backend: str) -> None:
    x, weight = torch.randn(1, 3, 4), torch.randn(2, 4, requires_grad=True)
    (found,) = torch.autograd.grad(kernels.linear(x, weight, backend=float64_backend).sum(), weight)
    torch.testing.assert_close(found, x.sum((0, 1)).expand(2, 4))


def test_linear_says_which_argument_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"weight: expected \[out, in\] = \(5, 4\), got \(5, 3\)"):
        kernels.linear(torch.randn(2, 3, 4), torch.randn(5, 3))
    with pytest.raises(ValueError, match=r"bias: expected \[out\] = \(5,\), got \(4,\)"):
        kernels.linear(torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(4))


def test_triton_has_no_linear_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the vendor's product is used, through the reference, and called so."""
    monkeypatch.delenv("MSFORMER_BACKEND", raising=False)
    x, weight = torch.randn(1, 3, 4), torch.randn(2, 4)
    with pytest.raises(kernels.BackendError, match=r"'triton' .*it has no kernels for linear; usable here: reference"):
        kernels.linear(x, weight, backend="triton")
    with kernels.use_backend("triton"):
        torch.testing.assert_close(kernels.linear(x, weight), F.linear(x, weight))
        assert kernels.linear.explain(x, weight).chosen != "triton"  # type: ignore[attr-defined]
    assert kernels.explain("cuda", operator="linear").chosen == "reference"
