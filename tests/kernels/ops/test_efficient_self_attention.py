"""Efficient self-attention, in its forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import msformer_kernels as kernels
from tests.kernels.cases import Case
from tests.kernels.cases.efficient_self_attention import CASES
from tests.kernels.ops.shared import OperatorTests, check_error_rule


class TestEfficientSelfAttention(OperatorTests):
    OPERATOR = "efficient_self_attention"
    CASES = CASES


class TestUnfolded:
    """The other form of the GPU backends, for wide tokens."""

    CASES = CASES

    @pytest.mark.accuracy
    @pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
    def test_error_rule(self, tiled: Case, dtype: str, unfolded_backend: str, poisoned: None) -> None:
        check_error_rule(tiled, dtype, unfolded_backend, most=3)


def test_heads_are_contiguous_slices() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 5, 4)
    weights = [torch.randn(4, 4) for _ in range(4)]
    arguments = [t for w in weights for t in (w, None)]
    two, context = kernels.efficient_self_attention(x, *arguments, num_heads=2, backend="reference")
    one = sum(
        kernels.efficient_self_attention(
            x,
            *(t for w in (*(w[h : h + 2] for w in weights[:3]), weights[3][:, h : h + 2]) for t in (w, None)),
            backend="reference",
        )[0]
        for h in (0, 2)
    )
    torch.testing.assert_close(two, one)
    assert context.shape == (1, 2, 2, 2)


def test_context_alone_is_differentiable(float64_backend: str) -> None:
    """As in the model's consistency loss: the output gets no gradient."""
    block = kernels.EfficientAttention(6, num_heads=2).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    found = {}
    for name in (float64_backend, "reference"):
        with kernels.use_backend(name):
            _, context = block(x)
            found[name] = torch.autograd.grad(context.square().sum(), (x, block.keys.weight), allow_unused=True)
    for a, b in zip(found[float64_backend], found["reference"], strict=True):
        torch.testing.assert_close(a, b)


def self_attention(**changes: Any) -> None:
    weights = {f"{name}_weight": torch.randn(4, 4) for name in ("query", "key", "value", "output")}
    biases = {f"{name}_bias": torch.randn(4) for name in ("query", "key", "value", "output")}
    kernels.efficient_self_attention(**({"x": torch.randn(2, 6, 4)} | weights | biases | changes))


BAD_ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.randn(6, 4)}, ValueError, r"x: expected \[B, N, C\], got shape \(6, 4\)"),
    ({"query_weight": torch.randn(4, 5)}, ValueError, r"query_weight: expected \[Dk, C\] = \(4, 4\)"),
    ({"key_weight": torch.randn(6, 4)}, ValueError, r"key_weight: expected \[Dk, C\] = \(4, 4\), got"),
    ({"key_bias": torch.randn(5)}, ValueError, r"key_bias: expected \[Dk\] = \(4,\), got \(5,\)"),
    ({"output_weight": torch.randn(4, 3)}, ValueError, r"output_weight: expected \[C, Dv\] = \(4, 4\)"),
    ({"num_heads": 3}, ValueError, "num_heads: 3 does not divide Dk = 4"),
    ({"num_heads": 0}, ValueError, "num_heads: expected at least 1, got 0"),
    ({"norm_bias": torch.randn(4)}, ValueError, "norm_bias: given without norm_weight"),
    ({"value_weight": torch.randn(4, 4).half()}, TypeError, "value_weight: has dtype torch.float16"),
    ({"x": torch.zeros(2, 6, 4, dtype=torch.int32)}, TypeError, "x: expected a floating-point"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_ARGUMENTS)
def test_bad_argument(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    """The error names the argument, what came and what was expected."""
    self_attention()
    with pytest.raises(error, match=message):
        self_attention(**changes)
