"""Efficient self-attention through the compiled CPU kernels (csrc/cpu/self_attention).

Statistics and context are in the arithmetic dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msformer_kernels import _native
from msformer_kernels.native import arguments
from msformer_kernels.native.arguments import (
    activation,
    addresses,
    arithmetic_dtype,
    contiguous,
    empty_gradients,
    mask_argument,
    rounded,
)
from msformer_kernels.ops.efficient_self_attention.spec import OPERATOR


def _inputs(call: Any) -> tuple[Any, ...]:
    """Sizes, options and x, as every entry point takes them first."""
    return (
        torch.get_num_threads(),
        *call.x.shape,
        call.query_weight.shape[0],
        call.value_weight.shape[0],
        call.num_heads,
        arguments.FORM,
        call.norm_eps,
        call.residual,
        *activation(call.x),
        *mask_argument(call.mask),
    )


def forward(call: Any) -> tuple[Tensor, ...]:
    parameters = contiguous(OPERATOR.parameters_of(call), arithmetic_dtype(call.x.dtype))
    output, *state = OPERATOR.fake(call)
    _native.self_attention_forward((*_inputs(call), *addresses(parameters), *addresses(state), *activation(output)))
    return output, *state


def backward(call: Any, saved: Any, grads: Any) -> tuple[Tensor, ...]:
    x, given = call.x, OPERATOR.parameters_of(call)
    parameters = contiguous(given, arithmetic_dtype(x.dtype))
    gradients = empty_gradients(given, x)
    state = [s.contiguous() for s in saved]
    grad_x = x.new_empty(x.shape)
    grad_context = grads.context
    if grad_context is not None:
        grad_context = grad_context.to(saved.context.dtype).contiguous()
    _native.self_attention_backward(
        (
            *_inputs(call),
            *addresses(parameters),
            *addresses(state),
            *activation(grads.output),
            *addresses((grad_context,)),
            *activation(grad_x),
            *addresses(gradients),
        )
    )
    return (grad_x, *rounded(gradients, given))
