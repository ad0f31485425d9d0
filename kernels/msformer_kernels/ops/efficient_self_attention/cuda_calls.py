"""Efficient self-attention through the CUDA kernels (csrc/cuda/self_attention_*.cu): the folded form, for up to 128
channels, key and value features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msformer_kernels.cuda.arguments import (
    contiguous,
    empty_gradients,
    engine,
    library,
    stream,
    tokens,
    with_width,
)
from msformer_kernels.ops.efficient_self_attention.spec import OPERATOR


def _engine(call: Any) -> int:
    return engine(call.x.dtype, call.x.shape[2], call.query_weight.shape[0], call.value_weight.shape[0])


def _inputs(call: Any, parameters: list[Tensor | None]) -> tuple[Any, ...]:
    """Sizes, options and inputs, as every entry point takes them first."""
    return (
        *call.x.shape,
        call.query_weight.shape[0],
        call.value_weight.shape[0],
        call.num_heads,
        call.norm_eps,
        call.residual,
        *tokens(call.x),
        *((0, 0, 0) if call.mask is None else (call.mask.data_ptr(), *call.mask.stride())),
        *with_width(parameters),
    )


def _addresses(tensors: Any) -> tuple[int, ...]:
    return tuple(0 if t is None else t.data_ptr() for t in tensors)


def forward(call: Any) -> tuple[Tensor, ...]:
    x = call.x
    output, *state = OPERATOR.fake(call)
    if x.numel() == 0:
        return output, *(s.zero_() for s in state)
    parameters, how, kernels = contiguous(OPERATOR.parameters_of(call), x), _engine(call), library(x)
    inputs = _inputs(call, parameters)
    scratch = x.new_empty(kernels.self_attention_forward_scratch(how, inputs), dtype=torch.uint8)
    kernels.self_attention_forward(
        how, stream(x), (*inputs, *_addresses(state), *tokens(output), scratch.data_ptr())
    )
    return output, *state


def backward(call: Any, saved: Any, grads: Any) -> tuple[Tensor, ...]:
    x, given = call.x, OPERATOR.parameters_of(call)
    grad_x, gradients = x.new_empty(x.shape), empty_gradients(given, x)
    if x.numel() == 0:
        return grad_x, *(g.zero_() for g in gradients)
    parameters, how, kernels = contiguous(given, x), _engine(call), library(x)
    inputs = _inputs(call, parameters)
    state = [s.contiguous() for s in saved]
    grad_context = grads.context
    if grad_context is not None:
        grad_context = grad_context.to(torch.float32).contiguous()
    scratch = x.new_empty(kernels.self_attention_backward_scratch(how, inputs), dtype=torch.uint8)
    kernels.self_attention_backward(
        how,
        stream(x),
        (
            *inputs,
            *_addresses(state),
            *tokens(grads.output),
            *_addresses((grad_context,)),
            *tokens(grad_x),
            *with_width(gradients),
            scratch.data_ptr(),
        ),
    )
    return grad_x, *gradients
