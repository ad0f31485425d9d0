"""A linear layer on tokens through the compiled CPU kernels (csrc/cpu/linear)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from msformer_kernels import _native
from msformer_kernels.native.arguments import (
    NO_ACTIVATION,
    activation,
    addresses,
    contiguous,
    empty_gradients,
    parameter_dtypes,
    rounded,
    settings,
)
from msformer_kernels.ops.linear.spec import OPERATOR


def _sizes(call: Any) -> tuple[int, ...]:
    batch, tokens, channels = call.x.shape
    return (*settings(call.x, OPERATOR.matrices_of(call)), batch, tokens, channels, call.weight.shape[0])


def forward(call: Any) -> Tensor:
    x = call.x
    parameters = contiguous(OPERATOR.parameters_of(call), parameter_dtypes(OPERATOR, call))
    output = x.new_empty(*x.shape[:2], call.weight.shape[0])
    _native.linear_forward((*_sizes(call), *activation(x), *addresses(parameters), *activation(output)))
    return output


def backward(call: Any, saved: Any, grads: Any) -> tuple[Tensor, ...]:
    x, given = call.x, OPERATOR.parameters_of(call)
    dtypes = parameter_dtypes(OPERATOR, call)
    parameters, gradients = contiguous(given, dtypes), empty_gradients(given, dtypes, x)
    grad_x = x.new_empty(x.shape if grads.x_wanted else 0)
    _native.linear_backward(
        (
            *_sizes(call),
            *activation(x),
            *addresses(parameters),
            *activation(grads.output),
            *(activation(grad_x) if grads.x_wanted else NO_ACTIVATION),
            *addresses(gradients),
        )
    )
    return (grad_x, *rounded(gradients, given))
