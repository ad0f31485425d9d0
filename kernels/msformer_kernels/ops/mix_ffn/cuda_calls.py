"""MixFFN and MixFFN-skip through the CUDA kernels (csrc/cuda/mix_ffn_forward.cu, mix_ffn_backward.cu).

The backward recomputes everything from the inputs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from msformer_kernels.cuda.arguments import (
    as_given,
    empty_gradients,
    engine,
    handed_over,
    library,
    scratch,
    stream,
    tokens,
    with_width,
)
from msformer_kernels.ops.mix_ffn.reference import ACTIVATIONS
from msformer_kernels.ops.mix_ffn.spec import OPERATOR, nothing_kept

_ACTIVATIONS = {name: number for number, name in enumerate(ACTIVATIONS)}


def _inputs(call: Any, parameters: list[Tensor | None]) -> tuple[Any, ...]:
    """Sizes, options and inputs, as every entry point takes them first."""
    return (
        call.x.shape[0],
        call.height,
        call.width,
        call.x.shape[2],
        call.fc1_weight.shape[0],
        call.norm_eps,
        call.skip,
        call.residual,
        _ACTIVATIONS[call.activation],
        *tokens(call.x),
        *with_width(parameters),
    )


def forward(call: Any) -> tuple[Tensor, ...]:
    x = call.x
    output, hidden = x.new_empty(x.shape), nothing_kept(call)
    if x.numel() == 0:
        return output, hidden
    parameters = handed_over(OPERATOR.parameters_of(call), x)
    library(x).mix_ffn_forward(engine(x.dtype), stream(x), (*_inputs(call, parameters), *tokens(output)))
    return output, hidden


def backward(call: Any, saved: Any, grads: Any) -> tuple[Tensor, ...]:
    x, given = call.x, OPERATOR.parameters_of(call)
    parameters = handed_over(given, x)
    grad_x, gradients = x.new_empty(x.shape), empty_gradients(parameters, x)
    if x.numel() == 0:
        return grad_x, *as_given([g.zero_() for g in gradients], given)
    how, kernels, inputs = engine(x.dtype), library(x), _inputs(call, parameters)
    memory = scratch(kernels.mix_ffn_backward_scratch(how, inputs), x)
    kernels.mix_ffn_backward(
        how,
        stream(x),
        (*inputs, *tokens(grads.output), *tokens(grad_x), *with_width(gradients), memory.data_ptr()),
    )
    return grad_x, *as_given(gradients, given)
