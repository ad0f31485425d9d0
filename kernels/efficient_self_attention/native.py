"""Folded efficient self-attention through the compiled CPU kernels (csrc/cpu/self_attention_*.cpp).

Tensors are validated by the caller. Statistics and context are in the arithmetic dtype. The key bias is not needed: the
softmax over tokens cancels it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msformer_kernels import _native
from msformer_kernels.native_arguments import (
    activation,
    address,
    addresses,
    arithmetic_dtype,
    contiguous,
    empty_gradients,
    mask_argument,
    rounded,
)


def _sizes(x: Tensor, query_weight: Tensor, value_weight: Tensor, num_heads: int) -> tuple[int, ...]:
    return (torch.get_num_threads(), *x.shape, query_weight.shape[0], value_weight.shape[0], num_heads)


def forward(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor | None,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    output_weight: Tensor,
    output_bias: Tensor | None,
    num_heads: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    residual: bool,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> output `[B, N, C]`, context `[B, heads, Dk/heads, Dv/heads]`, key_max and key_sum `[B, Dk]`, key_tokens
    `[B, Dk, C]`: the mean of the tokens under each key feature's softmax."""
    batch, tokens, channels = x.shape
    key_channels, value_channels = query_weight.shape[0], value_weight.shape[0]
    dtype = arithmetic_dtype(x.dtype)
    parameters = contiguous(
        (
            query_weight,
            query_bias,
            key_weight,
            value_weight,
            value_bias,
            output_weight,
            output_bias,
            norm_weight,
            norm_bias,
        ),
        dtype,
    )
    output = x.new_empty(batch, tokens, channels)
    context = x.new_empty(batch, num_heads, key_channels // num_heads, value_channels // num_heads, dtype=dtype)
    key_max = x.new_empty(batch, key_channels, dtype=dtype)
    key_sum = torch.empty_like(key_max)
    key_tokens = x.new_empty(batch, key_channels, channels, dtype=dtype)
    _native.self_attention_forward(
        _sizes(x, query_weight, value_weight, num_heads),
        norm_eps,
        residual,
        activation(x),
        mask_argument(mask),
        addresses(parameters),
        addresses((context, key_max, key_sum, key_tokens)),
        activation(output),
    )
    return output, context, key_max, key_sum, key_tokens


def backward(
    grad_output: Tensor,
    grad_context: Tensor | None,
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor | None,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    output_weight: Tensor,
    context: Tensor,
    key_max: Tensor,
    key_sum: Tensor,
    key_tokens: Tensor,
    num_heads: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    residual: bool,
    mask: Tensor | None,
) -> tuple[Tensor, ...]:
    """-> gradients of x and of query_weight, query_bias, key_weight, value_weight, value_bias, output_weight,
    output_bias, norm_weight and norm_bias; zero-size for an absent one, but always that of an output bias `[C]`."""
    any_output_bias = output_weight.new_empty(output_weight.shape[0])
    given = (
        query_weight,
        query_bias,
        key_weight,
        value_weight,
        value_bias,
        output_weight,
        any_output_bias,
        norm_weight,
        norm_bias,
    )
    parameters = contiguous(given, arithmetic_dtype(x.dtype))
    gradients = empty_gradients(given, x)
    state = [s.contiguous() for s in (context, key_max, key_sum, key_tokens)]
    grad_x = x.new_empty(x.shape)
    if grad_context is not None:
        grad_context = grad_context.to(context.dtype).contiguous()
    _native.self_attention_backward(
        _sizes(x, query_weight, value_weight, num_heads),
        norm_eps,
        residual,
        activation(x),
        mask_argument(mask),
        addresses(parameters),
        addresses(state),
        activation(grad_output),
        address(grad_context),
        activation(grad_x),
        addresses(gradients),
    )
    return (grad_x, *rounded(gradients, given))
