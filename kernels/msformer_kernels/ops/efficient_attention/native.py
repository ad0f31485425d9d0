"""Efficient attention on query, key, value through the compiled CPU kernels (csrc/cpu/attention).

The context and the statistics of the key softmax are in the arithmetic dtype.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from msformer_kernels import _native
from msformer_kernels.core.layout import room_like
from msformer_kernels.native.arguments import (
    activation,
    addresses,
    mask_argument,
    memory_activation,
    memory_arguments,
    settings,
)
from msformer_kernels.ops.efficient_attention.reference import NORMALIZATIONS
from msformer_kernels.ops.efficient_attention.spec import OPERATOR


def _inputs(call: Any) -> tuple[Any, ...]:
    """Sizes, options and inputs, as every entry point takes them first."""
    batch, heads, tokens, key_channels = call.key.shape
    return (
        *settings(call.query),
        batch,
        heads,
        call.query.shape[2],
        tokens,
        key_channels,
        call.value.shape[3],
        call.query_scale,
        call.key_scale,
        call.output_scale,
        call.normalize_query,
        NORMALIZATIONS.index(call.normalization),
        call.eps,
        *activation(call.query),
        *activation(call.key),
        *activation(call.value),
        *mask_argument(call.mask),
        *memory_arguments(call.memory_key, call.memory_value),
    )


def forward(call: Any) -> tuple[Tensor, ...]:
    output, *state = OPERATOR.fake(call)
    _native.attention_forward((*_inputs(call), *addresses(state), *activation(output)))
    return output, *state


def backward(call: Any, saved: Any, grads: Any) -> tuple[Tensor, ...]:
    found = tuple(room_like(x) for x in (call.query, call.key, call.value))
    of_memory = tuple(None if x is None else room_like(x) for x in (call.memory_key, call.memory_value))
    state = [x.contiguous() for x in saved]
    grad_context = grads.context
    if grad_context is not None:
        grad_context = grad_context.to(saved.context.dtype).contiguous()
    _native.attention_backward(
        (
            *_inputs(call),
            *addresses(state),
            *activation(grads.output),
            *addresses((grad_context,)),
            *(number for gradient in found for number in activation(gradient)),
            *(number for gradient in of_memory for number in memory_activation(gradient)),
        )
    )
    return *found, *(saved.context.new_empty(0) if x is None else x for x in of_memory)
