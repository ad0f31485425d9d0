"""MixFFN and MixFFN-skip through the compiled CPU kernels (csrc/cpu/mix_ffn_*.cpp).

Tensors are validated by the caller. The backward recomputes everything from the inputs.
"""

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

_ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "relu": 2}


def forward(
    x: Tensor,
    height: int,
    width: int,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    skip: bool,
    hidden_norm_weight: Tensor | None,
    hidden_norm_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    activation_name: str,
    residual: bool,
) -> Tensor:
    """-> output `[B, height * width, C]`."""
    given = (
        fc1_weight,
        fc1_bias,
        dw_weight,
        dw_bias,
        fc2_weight,
        fc2_bias,
        hidden_norm_weight,
        hidden_norm_bias,
        norm_weight,
        norm_bias,
    )
    parameters = contiguous(given, arithmetic_dtype(x.dtype))
    output = x.new_empty(x.shape)
    _native.mix_ffn_forward(
        (torch.get_num_threads(), x.shape[0], height, width, x.shape[2], fc1_weight.shape[0]),
        norm_eps,
        skip,
        residual,
        _ACTIVATIONS[activation_name],
        activation(x),
        addresses(parameters),
        activation(output),
    )
    return output


def backward(
    grad_output: Tensor,
    x: Tensor,
    height: int,
    width: int,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    skip: bool,
    hidden_norm_weight: Tensor | None,
    hidden_norm_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    activation_name: str,
    residual: bool,
) -> tuple[Tensor, ...]:
    """-> gradients of x and of the parameters in the order of the arguments; zero-size for an absent one."""
    given = (
        fc1_weight,
        fc1_bias,
        dw_weight,
        dw_bias,
        fc2_weight,
        fc2_bias,
        hidden_norm_weight,
        hidden_norm_bias,
        norm_weight,
        norm_bias,
    )
    parameters = contiguous(given, arithmetic_dtype(x.dtype))
    gradients = empty_gradients(given, x)
    grad_x = x.new_empty(x.shape)
    _native.mix_ffn_backward(
        (torch.get_num_threads(), x.shape[0], height, width, x.shape[2], fc1_weight.shape[0]),
        norm_eps,
        skip,
        residual,
        _ACTIVATIONS[activation_name],
        activation(x),
        addresses(parameters),
        activation(grad_output),
        activation(grad_x),
        addresses(gradients),
    )
    return (grad_x, *rounded(gradients, given))
