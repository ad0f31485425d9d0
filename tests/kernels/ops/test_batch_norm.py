"""BatchNorm of tokens: running statistics, evaluation mode, too few tokens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import msformer_kernels as kernels
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
    torch.manual_seed(0)
    x = torch.randn(1, 4001, 3) * 0.1 + 1000
    found = kernels.batch_norm(x, backend=backend)[0]
    exact = kernels.batch_norm(x.double(), backend="reference")[0]
    assert (found - exact).abs().max() < 2e-3, "rounding of the input's mean alone is 6e-4 of its deviation"


@pytest.mark.parametrize("shape", [(1, 1, 3), (0, 5, 3), (2, 0, 3)])
def test_too_few_tokens(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="x: expected at least 2 tokens in all"):
        kernels.batch_norm(torch.randn(*shape))
