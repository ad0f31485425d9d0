"""Efficient self-attention through CUDA kernels.

Up to 128 channels, key and value features, the folded form (csrc/cuda/self_attention_*.cu), whose matrices of one image
lie in the registers of a block. Wider, the unfolded form (unfolded.py) on the CUDA kernels of efficient_attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msformer_kernels.core.layout import room_like
from msformer_kernels.cuda.arguments import (
    address,
    as_given,
    empty_gradients,
    engine,
    handed_over,
    library,
    mask_argument,
    scratch,
    stream,
    tokens,
    with_width,
)
from msformer_kernels.ops.efficient_attention import cuda_calls as attention
from msformer_kernels.ops.efficient_self_attention import unfolded
from msformer_kernels.ops.efficient_self_attention.spec import kernel_parameters, nothing_of_memory, room
from msformer_kernels.ops.layer_norm import layer_norm_backward

MOST_FOLDED = 128


def _sizes(call: Any) -> tuple[int, int, int]:
    """Channels, key and value features."""
    return call.x.shape[2], call.query_weight.shape[0], call.value_weight.shape[0]


def _folds(call: Any) -> bool:
    return max(_sizes(call)) <= MOST_FOLDED


def _inputs(call: Any, parameters: list[Tensor | None]) -> tuple[Any, ...]:
    """Sizes, options and inputs, as every entry point takes them first."""
    return (
        *call.x.shape[:2],
        *_sizes(call),
        call.num_heads,
        call.norm_eps,
        call.residual,
        *tokens(call.x),
        *mask_argument(call.mask),
        *with_width(parameters),
    )


def forward(call: Any) -> tuple[Tensor, ...]:
    x = call.x
    if x.numel() == 0:
        return tuple(t.zero_() for t in room(call))
    if not _folds(call):
        return unfolded.forward(call, attention)
    output, *state = room(call)
    parameters, how, kernels = handed_over(kernel_parameters(call), x), engine(x.dtype), library(x)
    inputs = _inputs(call, parameters)
    memory = scratch(kernels.self_attention_forward_scratch(how, inputs), x)
    kernels.self_attention_forward(
        how, stream(x), (*inputs, *(s.data_ptr() for s in state[:-1]), *tokens(output), memory.data_ptr())
    )
    return output, *state


def backward(call: Any, saved: Any, grads: Any) -> tuple[Tensor, ...]:
    x, given = call.x, kernel_parameters(call)
    parameters = handed_over(given, x)
    grad_x, gradients = room_like(x), empty_gradients(parameters, x)
    if x.numel() == 0:
        return grad_x, *as_given([g.zero_() for g in gradients], given), *nothing_of_memory(x)
    if not _folds(call):
        return unfolded.backward(call, saved, grads, attention, layer_norm_backward)
    how, kernels, inputs = engine(x.dtype), library(x), _inputs(call, parameters)
    state = [s.contiguous() for s in saved]
    grad_context = None if grads.context is None else grads.context.to(torch.float32).contiguous()
    memory = scratch(kernels.self_attention_backward_scratch(how, inputs), x)
    kernels.self_attention_backward(
        how,
        stream(x),
        (
            *inputs,
            *(s.data_ptr() for s in state[:-1]),
            *tokens(grads.output),
            address(grad_context),
            *tokens(grad_x),
            *with_width(gradients),
            memory.data_ptr(),
        ),
    )
    return grad_x, *as_given(gradients, given), *nothing_of_memory(x)
