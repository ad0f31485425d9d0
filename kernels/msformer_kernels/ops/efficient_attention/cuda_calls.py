"""Efficient attention on query, key, value through the CUDA kernels (csrc/cuda/attention_forward.cu,
attention_backward.cu).

Tensors may have any strides. The context and the statistics of the key softmax are float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msformer_kernels.core.layout import room_like
from msformer_kernels.cuda.arguments import NO_HEADS, address, engine, heads, library, mask_argument, scratch, stream
from msformer_kernels.ops.efficient_attention.memory import joined, separated
from msformer_kernels.ops.efficient_attention.spec import OPERATOR

_PLAIN = (1.0, 1.0, 1.0, True, True)


def _options(call: Any) -> tuple[Any, ...]:
    softmax = call.normalization == "softmax"
    return call.query_scale, call.key_scale, call.output_scale, call.normalize_query, softmax


def _inputs(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Sizes, options and inputs, as every entry point takes them first."""
    batch, num_heads, tokens, key_channels = key.shape
    return (
        batch,
        num_heads,
        query.shape[2],
        tokens,
        key_channels,
        value.shape[3],
        *options,
        *heads(query),
        *heads(key),
        *heads(value),
        *mask_argument(mask),
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    output: Tensor,
    options: tuple[Any, ...] = _PLAIN,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fills the output; -> context, key_max and key_sum."""
    context = query.new_empty(*key.shape[:2], key.shape[3], value.shape[3], dtype=torch.float32)
    key_max, key_sum = context.new_empty(context.shape[:3]), context.new_empty(context.shape[:3])
    kernels, how, inputs = library(query), engine(query.dtype), _inputs(query, key, value, mask, options)
    memory = scratch(kernels.attention_forward_scratch(how, inputs), query)
    state = context.data_ptr(), key_max.data_ptr(), key_sum.data_ptr()
    kernels.attention_forward(how, stream(query), (*inputs, *state, *heads(output), memory.data_ptr()))
    return context, key_max, key_sum


def attend_context(query: Tensor, context: Tensor, output: Tensor) -> None:
    """Fills the output from a context that is known."""
    batch, num_heads, queries, key_channels = query.shape
    sizes = batch, num_heads, queries, 0, key_channels, output.shape[3]
    inputs = (*sizes, *_PLAIN, *heads(query), *NO_HEADS, *NO_HEADS, *mask_argument(None))
    contiguous = context.contiguous()
    arguments = (*inputs, contiguous.data_ptr(), *heads(output))
    library(query).attention_output(engine(query.dtype), stream(query), arguments)


def attend_backward(
    grad_output: Tensor,
    grad_context: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    state: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
    options: tuple[Any, ...] = _PLAIN,
) -> None:
    """Fills the gradients of query, key and value. `state` is what `attend` returned."""
    kernels, how, inputs = library(query), engine(query.dtype), _inputs(query, key, value, mask, options)
    context, key_max, key_sum = (x.contiguous() for x in state)
    if grad_context is not None:
        grad_context = grad_context.to(torch.float32).contiguous()
    memory = scratch(kernels.attention_backward_scratch(how, inputs), query)
    kernels.attention_backward(
        how,
        stream(query),
        (
            *inputs,
            context.data_ptr(),
            key_max.data_ptr(),
            key_sum.data_ptr(),
            *heads(grad_output),
            address(grad_context),
            *heads(grads[0]),
            *heads(grads[1]),
            *heads(grads[2]),
            memory.data_ptr(),
        ),
    )


def forward(call: Any) -> tuple[Tensor, ...]:
    call = joined(call)
    query, key, value = call.query, call.key, call.value
    if min(*key.shape[:2], key.shape[3], value.shape[3]) == 0:
        return tuple(x.zero_() for x in OPERATOR.fake(call))
    output = room_like(query, value.shape[3])
    return output, *attend(query, key, value, call.mask, output, _options(call))


def backward(call: Any, saved: Any, grads: Any) -> tuple[Tensor, ...]:
    given, call = call, joined(call)
    query, key, value = call.query, call.key, call.value
    found = room_like(query), room_like(key), room_like(value)
    if saved.context.numel() == 0:
        return separated(given, *(x.zero_() for x in found))
    attend_backward(grads.output, grads.context, query, key, value, call.mask, saved, found, _options(call))
    return separated(given, *found)
