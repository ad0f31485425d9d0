"""BatchNorm of tokens through the compiled CPU kernels (csrc/cpu/batch_norm.cpp), for validated tensors."""

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


def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """-> output `[B, N, C]`, mean and biased variance `[C]`."""
    dtype = arithmetic_dtype(x.dtype)
    parameters = contiguous((weight, bias), dtype)
    output = x.new_empty(x.shape)
    mean, variance = (x.new_empty(x.shape[2], dtype=dtype) for _ in range(2))
    _native.batch_norm_forward(
        (torch.get_num_threads(), *x.shape),
        eps,
        activation(x),
        addresses(parameters),
        addresses((mean, variance)),
        activation(output),
    )
    return output, mean, variance


def backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    """-> gradients of x, weight and bias; zero-size for an absent one."""
    given = (weight, bias)
    parameters = contiguous(given, arithmetic_dtype(x.dtype))
    gradients = empty_gradients(given, x)
    statistics = contiguous((mean, variance), arithmetic_dtype(x.dtype))
    grad_x = x.new_empty(x.shape)
    _native.batch_norm_backward(
        (torch.get_num_threads(), *x.shape),
        eps,
        activation(x),
        addresses(parameters),
        addresses(statistics),
        activation(grad_output),
        activation(grad_x),
        addresses(gradients),
    )
    return (grad_x, *rounded(gradients, given))
