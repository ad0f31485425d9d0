"""The declaration of ``msformer::efficient_self_attention``.

The op also returns what its backward needs besides its inputs: the maximum and sum of the key softmax and the mean of
the tokens under it, `[B, Dk]` twice and `[B, Dk, C]`. The gradient of the key bias is zero: the softmax over tokens
cancels it, and no backend looks at it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from msformer_kernels.core.operator import Operator
from msformer_kernels.core.precision import arithmetic_dtype
from msformer_kernels.core.registration import cast_output
from msformer_kernels.ops.efficient_self_attention.reference import efficient_self_attention


def _fake(call: Any) -> tuple[Tensor, ...]:
    x, heads = call.x, call.num_heads
    batch, _, channels = x.shape
    keys, values = call.query_weight.shape[0], call.value_weight.shape[0]
    wide = arithmetic_dtype(x.dtype)
    return (
        x.new_empty(x.shape),
        x.new_empty(batch, heads, keys // heads, values // heads, dtype=wide),
        x.new_empty(batch, keys, dtype=wide),
        x.new_empty(batch, keys, dtype=wide),
        x.new_empty(batch, keys, channels, dtype=wide),
    )


def _products(call: Any) -> int:
    """As published, unfolded: the projections, and context and output of every head."""
    weights = (call.query_weight, call.key_weight, call.value_weight, call.output_weight)
    heads = 2 * call.query_weight.shape[0] * call.value_weight.shape[0] // call.num_heads
    return call.x.shape[:2].numel() * (sum(weight.numel() for weight in weights) + heads)


def _needs_features(call: Any) -> str | None:
    """Why the kernels of a GPU do not take a call; None if they do."""
    if min(call.x.shape[2], call.query_weight.shape[0], call.value_weight.shape[0]) > 0:
        return None
    return "its kernels take at least one channel, key feature and value feature"


OPERATOR = Operator(
    efficient_self_attention,
    outputs=("output", "context"),
    state=("key_max", "key_sum", "key_tokens"),
    fake=_fake,
    products=_products,
    served_by=("native", "cuda", "triton"),
    without_gradient=("mask",),
    zero_gradient=("key_bias",),
    matrices=("query_weight", "key_weight", "value_weight", "output_weight"),
    autocast=cast_output,
    limits={"cuda": _needs_features, "triton": _needs_features},
)
