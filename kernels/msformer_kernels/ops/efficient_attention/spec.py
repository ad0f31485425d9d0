"""The declaration of ``msformer::efficient_attention``. The op also returns the maximum and sum of the key softmax,
or the sum of keys that ReLU attention divides by, which its backward needs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from msformer_kernels.core.layout import room_like
from msformer_kernels.core.operator import Operator
from msformer_kernels.core.precision import arithmetic_dtype
from msformer_kernels.core.registration import cast_inputs
from msformer_kernels.ops.efficient_attention.reference import efficient_attention


def _fake(call: Any) -> tuple[Tensor, ...]:
    query, value_channels = call.query, call.value.shape[3]
    batch, heads, _, key_channels = query.shape
    wide = arithmetic_dtype(query.dtype)
    return (
        room_like(query, value_channels),
        query.new_empty(batch, heads, key_channels, value_channels, dtype=wide),
        query.new_empty(batch, heads, key_channels, dtype=wide),
        query.new_empty(batch, heads, key_channels, dtype=wide),
    )


def _products(call: Any) -> int:
    """Of the context and the output."""
    batch, heads, queries, channels = call.query.shape
    _, _, keys, values = call.value.shape
    memory = 0 if call.memory_key is None else call.memory_key.shape[1]
    return batch * heads * (queries + keys + memory) * channels * values


def _why_not_relu(call: Any) -> str | None:
    """Of the GPU backends."""
    return "it has no kernels for normalization 'relu'" if call.normalization == "relu" else None


OPERATOR = Operator(
    efficient_attention,
    outputs=("output", "context"),
    state=("key_max", "key_sum"),
    fake=_fake,
    products=_products,
    served_by=("native", "cuda", "triton"),
    activations=("query", "key", "value"),
    without_gradient=("mask",),
    wide_parameters=True,
    keeps_layout=True,
    autocast=cast_inputs,
    limits={"cuda": _why_not_relu, "triton": _why_not_relu},
)
