"""BatchNorm of tokens: running statistics, evaluation mode, too few tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import msformer_kernels as kernels
from tests.kernels.cases import require
from tests.kernels.cases.batch_norm import CASES
from tests.kernels.ops.shared import OperatorTests


class TestBatchNorm(OperatorTests):
    OPERATOR = "batch_norm"
    CASES = CASES


@pytest.mark.parametrize("momentum", [0.1, 0.4, None])
def test_running_statistics_are_those_of_batch_norm_2d(momentum: float | None, backend: str) -> None:
    torch.manual_seed(0)
    ours, theirs = kernels.TokenBatchNorm(5, momentum=momentum), nn.BatchNorm2d(5, momentum=momentum)
    for _ in range(3):
        x = torch.randn(2, 12, 5) * 3 + 1
        with kernels.use_backend(backend):
            found = ours(x)
        expected = theirs(x.transpose(1, 2).unflatten(2, (3, 4)))
        torch.testing.assert_close(found, expected.flatten(2).transpose(1, 2))
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=name)
    ours.eval()
    theirs.eval()
    with kernels.use_backend(backend):
        found = ours(x)
    torch.testing.assert_close(found, theirs(x.transpose(1, 2).unflatten(2, (3, 4))).flatten(2).transpose(1, 2))


def test_statistics_that_are_returned(float64_backend: str) -> None:
    x = torch.randn(2, 50, 3, dtype=torch.float64) + 100
    _, mean, variance = kernels.batch_norm(x, backend=float64_backend)
    torch.testing.assert_close(mean, x.mean((0, 1)))
    torch.testing.assert_close(variance, x.var((0, 1), correction=0))
    assert not mean.requires_grad


def test_a_large_mean_does_not_swallow_the_variance(backend: str) -> None:
    require(backend, "batch_norm")
    torch.manual_seed(0)
    x = torch.randn(1, 4001, 3) * 0.1 + 1000
    found = kernels.batch_norm(x, backend=backend)[0]
    exact = kernels.batch_norm(x.double(), backend="reference")[0]
    assert (found - exact).abs().max() < 2e-3, "rounding of the input's mean alone is 6e-4 of its deviation"


def test_a_variance_beyond_the_largest_float_is_not_wrong_in_silence(backend: str) -> None:
    require(backend, "batch_norm")
    torch.manual_seed(0)
    x = torch.randn(1, 50, 3)
    expected = kernels.batch_norm(x, backend=backend)[0]
    x[..., 1] *= 1e25
    found = kernels.batch_norm(x, backend=backend)[0]
    assert found[..., 1].isnan().all()
    torch.testing.assert_close(found[..., ::2], expected[..., ::2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_float32_parameters_with_narrow_activations(dtype: torch.dtype, backend: str) -> None:
    """As `torch.nn.BatchNorm2d`: they count with all their digits, and so do their gradients."""
    torch.manual_seed(0)
    layer = kernels.TokenBatchNorm(5)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(5))
        layer.bias.copy_(torch.randn(5))
    x = torch.randn(2, 30, 5).to(dtype).requires_grad_()
    exact = F.batch_norm(x.double().flatten(0, 1), None, None, layer.weight.double(), layer.bias.double(), True)
    grad = torch.randn(60, 5, dtype=torch.float64).to(dtype)
    inputs = (x, layer.weight, layer.bias)
    expected = [exact, *torch.autograd.grad(exact, inputs, grad.double())]
    with kernels.use_backend(backend):
        output = layer(x)
    found = [output.flatten(0, 1), *torch.autograd.grad(output, inputs, grad.view_as(output))]
    assert [value.dtype for value in found] == [dtype, dtype, torch.float32, torch.float32]
    for value, want in zip(found, expected, strict=True):
        if value.dtype == dtype:  # rounded once, at the end
            want, value = want.to(dtype).double(), value.double()
            assert ((value - want).abs() <= torch.finfo(dtype).eps * want.abs() + 1e-6).all()
            assert (value != want).double().mean() < 0.02
        else:
            torch.testing.assert_close(value, want.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "of_parameters"),
    [
        (torch.float64, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float64),
    ],
    ids=str,
)
def test_other_mixtures_are_refused(dtype: torch.dtype, of_parameters: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"weight: has dtype {of_parameters}, but x has {dtype}"):
        kernels.batch_norm(torch.randn(1, 4, 3, dtype=dtype), torch.randn(3, dtype=of_parameters))


@pytest.mark.parametrize("shape", [(1, 1, 3), (0, 5, 3), (2, 0, 3)])
def test_too_few_tokens(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="x: expected at least 2 tokens in all"):
        kernels.batch_norm(torch.randn(*shape))


@pytest.mark.parametrize("backend_name", ["reference", "native"])
@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_that_come_in_another_layout_than_x(batch: int, backend_name: str) -> None:
    """And a weight with gaps. PyTorch 2.13 reads both wrongly where an image of one column is normalised."""
    require(backend_name)
    torch.manual_seed(0)
    x = torch.randn(batch, 9, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64)[::2].requires_grad_()
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    given = torch.randn(batch, 9, 4, dtype=torch.float64)
    mean, variance = x.mean((0, 1)), x.var((0, 1), correction=0)
    expected = torch.autograd.grad((x - mean) / (variance + 1e-5).sqrt() * weight + bias, (x, weight, bias), given)
    for incoming in (given, given.transpose(1, 2).contiguous().transpose(1, 2)):
        output = kernels.batch_norm(x, weight, bias, backend=backend_name)[0]
        for found, value in zip(torch.autograd.grad(output, (x, weight, bias), incoming), expected, strict=True):
            torch.testing.assert_close(found, value)
