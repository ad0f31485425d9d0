"""Efficient attention on query, key, value through the CUDA kernels (csrc/cuda/attention_forward.cu,
attention_backward.cu).

The context and the statistics of the key softmax are float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msformer_kernels.cuda.arguments import address, engine, heads, library, mask_argument, scratch, stream
from msformer_kernels.ops.efficient_attention.spec import OPERATOR


def _inputs(call: Any) -> tuple[Any, ...]:
    """Sizes, options and inputs, as every entry point takes them first."""
    batch, num_heads, tokens, key_channels = call.key.shape
    return (
        batch,
        num_heads,
        call.query.shape[2],
        tokens,
        key_channels,
        call.value.shape[3],
        call.query_scale,
        call.key_scale,
        call.output_scale,
        call.normalize_query,
        call.normalization == "softmax",
        *heads(call.query),
        *heads(call.key),
        *heads(call.value),
        *mask_argument(call.mask),
    )


def forward(call: Any) -> tuple[Tensor, ...]:
    found = OPERATOR.fake(call)
    output, context, key_max, key_sum = found
    if context.numel() == 0:
        return tuple(x.zero_() for x in found)
    kernels, how, inputs = library(output), engine(output.dtype), _inputs(call)
    memory = scratch(kernels.attention_forward_scratch(how, inputs), output)
    state = context.data_ptr(), key_max.data_ptr(), key_sum.data_ptr()
    kernels.attention_forward(how, stream(output), (*inputs, *state, *heads(output), memory.data_ptr()))
    return found


def backward(call: Any, saved: Any, grads: Any) -> tuple[Tensor, Tensor, Tensor]:
    query = call.query
    grad_query, grad_key, grad_value = (x.new_empty(x.shape) for x in (query, call.key, call.value))
    if saved.context.numel() == 0:
        return grad_query.zero_(), grad_key.zero_(), grad_value.zero_()
    kernels, how, inputs = library(query), engine(query.dtype), _inputs(call)
    context, key_max, key_sum = saved.context.contiguous(), saved.key_max.contiguous(), saved.key_sum.contiguous()
    grad_context = None if grads.context is None else grads.context.to(torch.float32).contiguous()
    memory = scratch(kernels.attention_backward_scratch(how, inputs), query)
    kernels.attention_backward(
        how,
        stream(query),
        (
            *inputs,
            context.data_ptr(),
            key_max.data_ptr(),
            key_sum.data_ptr(),
            *heads(grads.output),
            address(grad_context),
            *heads(grad_query),
            *heads(grad_key),
            *heads(grad_value),
            memory.data_ptr(),
        ),
    )
    return grad_query, grad_key, grad_value
