"""Efficient self-attention through the compiled CPU kernels (csrc/cpu/self_attention).

Statistics and context are in the arithmetic dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from msformer_kernels import _native
from msformer_kernels.core.layout import room_like
from msformer_kernels.native import arguments
from msformer_kernels.native.arguments import (
    activation,
    addresses,
    aligned,
    contiguous,
    empty_gradients,
    mask_argument,
    memory_activation,
    memory_arguments,
    parameter_dtypes,
    rounded,
    settings,
)
from msformer_kernels.ops.efficient_self_attention.spec import OPERATOR, few_tokens, kernel_parameters


def _is_unfolded(call: Any) -> bool:
    """Whether kernels take the form for few tokens, where weights may be bfloat16; never where there is nothing."""
    return bool(few_tokens(call)) and call.x.shape[0] > 0


def _dtypes(call: Any) -> list[torch.dtype]:
    return parameter_dtypes(OPERATOR, call, _is_unfolded(call))


def _inputs(call: Any, matrix_dtype: torch.dtype) -> tuple[Any, ...]:
    """Sizes, options and x, as every entry point takes them first."""
    return (
        *settings(call.x, OPERATOR.matrices_of(call)),
        *call.x.shape,
        call.query_weight.shape[0],
        call.value_weight.shape[0],
        call.num_heads,
        arguments.FEW_TOKENS if _is_unfolded(call) else arguments.MANY_TOKENS,
        arguments.DTYPES[matrix_dtype],
        call.norm_eps,
        call.norm_kind == "layer",
        call.residual,
        *activation(call.x),
        *mask_argument(call.mask),
        *memory_arguments(call.memory_key, call.memory_value),
    )


def _state(state: Sequence[Tensor]) -> tuple[int, ...]:
    """What the backward needs besides the inputs, in the order of the declaration."""
    return *addresses(state[:-1]), *activation(state[-1])


def forward(call: Any) -> tuple[Tensor, ...]:
    dtypes = _dtypes(call)
    parameters = contiguous(kernel_parameters(call), dtypes)
    output, *state = OPERATOR.fake(call)
    _native.self_attention_forward(
        (*_inputs(call, dtypes[0]), *addresses(parameters), *_state(state), *activation(output)),
    )
    return output, *state


def backward(call: Any, saved: Any, grads: Any) -> tuple[Tensor, ...]:
    x, given = call.x, kernel_parameters(call)
    dtypes = _dtypes(call)
    parameters, gradients = contiguous(given, dtypes), empty_gradients(given, dtypes, x)
    state = [aligned(s.contiguous()) for s in saved]
    grad_x = room_like(x)
    of_memory = [None if m is None else room_like(m) for m in (call.memory_key, call.memory_value)]
    grad_context = grads.context
    if grad_context is not None:
        grad_context = grad_context.to(saved.context.dtype).contiguous()
    _native.self_attention_backward(
        (
            *_inputs(call, dtypes[0]),
            *addresses(parameters),
            *_state(state),
            *activation(grads.output),
            *addresses((grad_context,)),
            *activation(grad_x),
            *memory_activation(of_memory[0]),
            *memory_activation(of_memory[1]),
            *addresses(gradients),
        )
    )
    gradients_of_memory = [saved.context.new_empty(0) if m is None else m for m in of_memory]
    return (grad_x, *rounded(gradients, given), *gradients_of_memory)
