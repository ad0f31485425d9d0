"""MixFFN and MixFFN-skip through the compiled CPU kernels (csrc/cpu/mix_ffn).

The backward recomputes everything from the inputs.
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
    rounded,
)
from msformer_kernels.ops.mix_ffn.reference import ACTIVATIONS
from msformer_kernels.ops.mix_ffn.spec import OPERATOR

_ACTIVATIONS = {name: number for number, name in enumerate(ACTIVATIONS)}


def _options(call: Any) -> tuple[Any, ...]:
    """Sizes and options, as every entry point takes them first."""
    batch, _, channels = call.x.shape
    return (
        torch.get_num_threads(),
        batch,
        call.height,
        call.width,
        channels,
        call.fc1_weight.shape[0],
        call.dw_weight.shape[2],
        arguments.FORM,
        call.norm_eps,
        call.skip,
        call.residual,
        _ACTIVATIONS[call.activation],
        _ACTIVATIONS[call.inner_activation],
    )


def forward(call: Any) -> Tensor:
    x = call.x
    parameters = contiguous(OPERATOR.parameters_of(call), arithmetic_dtype(x.dtype))
    output = x.new_empty(x.shape)
    _native.mix_ffn_forward((*_options(call), *activation(x), *addresses(parameters), *activation(output)))
    return output


def backward(call: Any, saved: Any, grads: Any) -> tuple[Tensor, ...]:
    x, given = call.x, OPERATOR.parameters_of(call)
    parameters = contiguous(given, arithmetic_dtype(x.dtype))
    gradients = empty_gradients(given, x)
    grad_x = x.new_empty(x.shape)
    _native.mix_ffn_backward(
        (
            *_options(call),
            *activation(x),
            *addresses(parameters),
            *activation(grads.output),
            *activation(grad_x),
            *addresses(gradients),
        )
    )
    return (grad_x, *rounded(gradients, given))
