"""Bad arguments: each error names the argument, what came and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import msformer_kernels as kernels


def attention(**changes: Any) -> None:
    arguments: dict[str, Any] = {
        "query": torch.randn(2, 3, 5, 4),
        "key": torch.randn(2, 3, 7, 4),
        "value": torch.randn(2, 3, 7, 6),
    }
    kernels.efficient_attention(**(arguments | changes))


def self_attention(**changes: Any) -> None:
    weights = {f"{name}_weight": torch.randn(4, 4) for name in ("query", "key", "value", "output")}
    biases = {f"{name}_bias": torch.randn(4) for name in ("query", "key", "value", "output")}
    kernels.efficient_self_attention(**({"x": torch.randn(2, 6, 4)} | weights | biases | changes))


def mix_ffn(**changes: Any) -> None:
    arguments: dict[str, Any] = {
        "x": torch.randn(2, 6, 4),
        "height": 2,
        "width": 3,
        "fc1_weight": torch.randn(8, 4),
        "fc1_bias": None,
        "dw_weight": torch.randn(8, 1, 3, 3),
        "dw_bias": None,
        "fc2_weight": torch.randn(4, 8),
        "fc2_bias": None,
    }
    kernels.mix_ffn(**(arguments | changes))


meta = torch.device("meta")
CASES: list[tuple[Callable[..., None], dict[str, Any], type[Exception], str]] = [
    (
        attention,
        {"query": torch.randn(3, 5, 4)},
        ValueError,
        r"query: expected \[B, heads, Nq, Dk\], got shape \(3, 5, 4\)",
    ),
    (attention, {"key": torch.randn(2, 3, 7, 5)}, ValueError, r"key: expected .* = \(2, 3, 7, 4\), got \(2, 3, 7, 5\)"),
    (attention, {"value": torch.randn(2, 3, 8, 6)}, ValueError, r"value: expected .* = \(2, 3, 7, 6\), got"),
    (attention, {"value": torch.randn(2, 1, 7, 6)}, ValueError, r"value: expected"),
    (attention, {"key": torch.randn(2, 3, 7, 4).double()}, TypeError, "key: has dtype torch.float64, but query has"),
    (attention, {"query": torch.ones(2, 3, 5, 4, dtype=torch.int64)}, TypeError, "query: expected a floating-point"),
    (attention, {"value": torch.randn(2, 3, 7, 6, device=meta)}, ValueError, "value: is on meta, but query is on cpu"),
    (attention, {"mask": torch.ones(2, 7)}, TypeError, "mask: expected a boolean tensor .* got torch.float32"),
    (attention, {"mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError, r"mask: expected \[B, N\] = \(2, 7\), got"),
    (attention, {"normalization": "l2"}, ValueError, "normalization: expected one of softmax, scaling, got 'l2'"),
    (self_attention, {"x": torch.randn(6, 4)}, ValueError, r"x: expected \[B, N, C\], got shape \(6, 4\)"),
    (self_attention, {"query_weight": torch.randn(4, 5)}, ValueError, r"query_weight: expected \[Dk, C\] = \(4, 4\)"),
    (self_attention, {"key_weight": torch.randn(6, 4)}, ValueError, r"key_weight: expected \[Dk, C\] = \(4, 4\), got"),
    (self_attention, {"key_bias": torch.randn(5)}, ValueError, r"key_bias: expected \[Dk\] = \(4,\), got \(5,\)"),
    (self_attention, {"output_weight": torch.randn(4, 3)}, ValueError, r"output_weight: expected \[C, Dv\] = \(4, 4\)"),
    (self_attention, {"num_heads": 3}, ValueError, "num_heads: 3 does not divide Dk = 4"),
    (self_attention, {"num_heads": 0}, ValueError, "num_heads: expected at least 1, got 0"),
    (self_attention, {"norm_bias": torch.randn(4)}, ValueError, "norm_bias: given without norm_weight"),
    (self_attention, {"value_weight": torch.randn(4, 4).half()}, TypeError, "value_weight: has dtype torch.float16"),
    (self_attention, {"x": torch.zeros(2, 6, 4, dtype=torch.int32)}, TypeError, "x: expected a floating-point"),
    (mix_ffn, {"x": torch.randn(2, 4, 2, 3)}, ValueError, r"x: expected \[B, N, C\], got shape"),
    (mix_ffn, {"height": 3}, ValueError, r"x: has 6 tokens, expected height \* width = 3 \* 3 = 9"),
    (mix_ffn, {"height": -2, "width": -3}, ValueError, "x: has 6 tokens"),
    (
        mix_ffn,
        {"fc1_weight": torch.randn(8, 5)},
        ValueError,
        r"fc1_weight: expected \[hidden, C\] = \(8, 4\), got \(8, 5\)",
    ),
    (mix_ffn, {"dw_weight": torch.randn(8, 3, 3)}, ValueError, r"dw_weight: expected .* = \(8, 1, 3, 3\), got"),
    (mix_ffn, {"fc2_weight": torch.randn(8, 4)}, ValueError, r"fc2_weight: expected \[C, hidden\] = \(4, 8\), got"),
    (mix_ffn, {"hidden_norm_bias": torch.randn(8)}, ValueError, "hidden_norm_bias: given without hidden_norm_weight"),
    (
        mix_ffn,
        {"hidden_norm_weight": torch.randn(4)},
        ValueError,
        r"hidden_norm_weight: expected .* = \(8,\), got \(4,\)",
    ),
    (mix_ffn, {"activation": "swish"}, ValueError, "activation: expected one of gelu, gelu_tanh, relu, got 'swish'"),
    (mix_ffn, {"fc2_bias": torch.randn(4).double()}, TypeError, "fc2_bias: has dtype torch.float64"),
]


@pytest.mark.parametrize(
    ("call", "changes", "error", "message"), CASES, ids=[f"{c[0].__name__}-{i}" for i, c in enumerate(CASES)]
)
def test_bad_argument(call: Callable[..., None], changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(**changes)


@pytest.mark.parametrize("call", [attention, self_attention, mix_ffn])
def test_the_unchanged_arguments_pass(call: Callable[..., None]) -> None:
    call()


def test_layers_refuse_bad_sizes() -> None:
    with pytest.raises(ValueError, match="num_heads: 3 does not divide key_channels = 8"):
        kernels.EfficientAttention(8, num_heads=3)
    with pytest.raises(ValueError, match="num_heads: 3 does not divide value_channels = 8"):
        kernels.EfficientAttention(8, key_channels=6, num_heads=3)
    with pytest.raises(ValueError, match="in_channels: expected at least 1, got 0"):
        kernels.EfficientAttention(0)
    with pytest.raises(ValueError, match="hidden_features: expected at least 1, got -4"):
        kernels.MixFFN(4, -4)
    with pytest.raises(ValueError, match="activation: expected one of"):
        kernels.MixFFN(4, 8, activation="swish")
    with pytest.raises(ValueError, match="ffn: expected one of mix_skip, mix, mlp, got 'moe'"):
        kernels.EfficientTransformerBlock(8, ffn="moe")
    with pytest.raises(ValueError, match="x: has 6 tokens"):
        kernels.EfficientTransformerBlock(8, ffn="mlp")(torch.randn(1, 6, 8), 2, 2)
