"""A linear layer on tokens through the compiled CPU kernels (csrc/cpu/linear.cpp), for validated tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from msformer_kernels import _native
from msformer_kernels.native_arguments import (
    activation,
    addresses,
    arithmetic_dtype,
    contiguous,
    empty_gradients,
    rounded,
)


def _sizes(x: Tensor, weight: Tensor) -> tuple[int, ...]:
    return (torch.get_num_threads(), x.shape[0], x.shape[1], weight.shape[1], weight.shape[0])


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """-> output `[B, N, out]`."""
    parameters = contiguous((weight, bias), arithmetic_dtype(x.dtype))
    output = x.new_empty(*x.shape[:2], weight.shape[0])
    _native.linear_forward(_sizes(x, weight), activation(x), addresses(parameters), activation(output))
    return output


def backward(
    grad_output: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, input_gradient: bool
) -> tuple[Tensor, ...]:
    """-> gradients of x, weight and bias; zero-size for an absent bias, and for x unless it is asked for."""
    given = (weight, bias)
    parameters = contiguous(given, arithmetic_dtype(x.dtype))
    gradients = empty_gradients(given, x)
    grad_x = x.new_empty(x.shape if input_gradient else 0)
    _native.linear_backward(
        _sizes(x, weight),
        activation(x),
        addresses(parameters),
        activation(grad_output),
        activation(grad_x) if input_gradient else (),
        addresses(gradients),
    )
    return (grad_x, *rounded(gradients, given))
