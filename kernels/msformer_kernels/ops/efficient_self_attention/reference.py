"""Efficient self-attention in plain PyTorch, unfolded as published: the specification of the operator.

A norm (optional), three projections, `efficient_attention` of every head, output projection, residual (optional).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from msformer_kernels.ops.efficient_attention.reference import efficient_attention
from msformer_kernels.ops.layer_norm import norm_of


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    """``[B, N, D]`` -> ``[B, heads, N, D / heads]``."""
    return x.unflatten(-1, (num_heads, x.shape[-1] // num_heads)).transpose(1, 2)


def efficient_self_attention(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor | None,
    key_weight: Tensor,
    key_bias: Tensor | None,
    value_weight: Tensor,
    value_bias: Tensor | None,
    output_weight: Tensor,
    output_bias: Tensor | None,
    *,
    num_heads: int = 1,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    norm_kind: str = "layer",
    residual: bool = False,
    mask: Tensor | None = None,
    memory_key: Tensor | None = None,
    memory_value: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `msformer_kernels.ops.efficient_self_attention`."""
    tokens = norm_of(norm_kind, x, norm_weight, norm_bias, norm_eps)
    query = _split_heads(F.linear(tokens, query_weight, query_bias), num_heads)
    key = _split_heads(F.linear(tokens, key_weight, key_bias), num_heads)
    value = _split_heads(F.linear(tokens, value_weight, value_bias), num_heads)
    attended, context = efficient_attention(
        query, key, value, mask=mask, memory_key=memory_key, memory_value=memory_value
    )
    output = F.linear(attended.transpose(1, 2).flatten(2), output_weight, output_bias)
    return (x + output if residual else output), context
