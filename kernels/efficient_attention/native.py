"""Efficient attention on query, key, value through the compiled CPU kernels (csrc/cpu/attention.cpp).

Tensors are validated by the caller. The context and the statistics of the key softmax are in the arithmetic dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msformer_kernels import _native
from msformer_kernels.native_arguments import activation, address, addresses, arithmetic_dtype, mask_argument


def _sizes(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    batch, heads, tokens, key_channels = key.shape
    return (torch.get_num_threads(), batch, heads, query.shape[2], tokens, key_channels, value.shape[3])


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    query_scale: float,
    key_scale: float,
    output_scale: float,
    normalize_query: bool,
    normalization: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> output `[B, heads, Nq, Dv]`, context `[B, heads, Dk, Dv]`, key_max and key_sum `[B, heads, Dk]`."""
    batch, heads, _, key_channels = key.shape
    dtype = arithmetic_dtype(query.dtype)
    output = query.new_empty(batch, heads, query.shape[2], value.shape[3])
    context = query.new_empty(batch, heads, key_channels, value.shape[3], dtype=dtype)
    key_max = query.new_empty(batch, heads, key_channels, dtype=dtype)
    key_sum = torch.empty_like(key_max)
    _native.attention_forward(
        _sizes(query, key, value),
        (query_scale, key_scale, output_scale),
        normalize_query,
        normalization == "softmax",
        activation(query),
        activation(key),
        activation(value),
        mask_argument(mask),
        addresses((context, key_max, key_sum)),
        activation(output),
    )
    return output, context, key_max, key_sum


def backward(
    grad_output: Tensor,
    grad_context: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    context: Tensor,
    key_max: Tensor,
    key_sum: Tensor,
    query_scale: float,
    key_scale: float,
    output_scale: float,
    normalize_query: bool,
    normalization: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of query, key and value, in their dtypes."""
    grad_query, grad_key, grad_value = (x.new_empty(x.shape) for x in (query, key, value))
    state = [x.contiguous() for x in (context, key_max, key_sum)]
    if grad_context is not None:
        grad_context = grad_context.to(context.dtype).contiguous()
    _native.attention_backward(
        _sizes(query, key, value),
        (query_scale, key_scale, output_scale),
        normalize_query,
        normalization == "softmax",
        activation(query),
        activation(key),
        activation(value),
        mask_argument(mask),
        addresses(state),
        activation(grad_output),
        address(grad_context),
        activation(grad_query),
        activation(grad_key),
        activation(grad_value),
    )
    return grad_query, grad_key, grad_value
