"""BatchNorm of tokens through the compiled CPU kernels (csrc/cpu/batch_norm)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msformer_kernels import _native
from msformer_kernels.native.arguments import (
    activation,
    addresses,
    arithmetic_dtype,
    contiguous,
    empty_gradients,
    parameter_dtypes,
    rounded,
)
from msformer_kernels.ops.batch_norm.spec import OPERATOR


def forward(call: Any) -> tuple[Tensor, Tensor, Tensor]:
    x = call.x
    parameters = contiguous(OPERATOR.parameters_of(call), parameter_dtypes(OPERATOR, call))
    output, mean, variance = OPERATOR.fake(call)
    _native.batch_norm_forward(
        (
            torch.get_num_threads(),
            *x.shape,
            call.eps,
            *activation(x),
            *addresses(parameters),
            *addresses((mean, variance)),
            *activation(output),
        )
    )
    return output, mean, variance


def backward(call: Any, saved: Any, grads: Any) -> tuple[Tensor, ...]:
    x, given = call.x, OPERATOR.parameters_of(call)
    dtypes = parameter_dtypes(OPERATOR, call)
    parameters, gradients = contiguous(given, dtypes), empty_gradients(given, dtypes, x)
    statistics = contiguous(saved, [arithmetic_dtype(x.dtype)] * 2)
    grad_x = x.new_empty(x.shape)
    _native.batch_norm_backward(
        (
            torch.get_num_threads(),
            *x.shape,
            call.eps,
            *activation(x),
            *addresses(parameters),
            *addresses(statistics),
            *activation(grads.output),
            *activation(grad_x),
            *addresses(gradients),
        )
    )
    return (grad_x, *rounded(gradients, given))
