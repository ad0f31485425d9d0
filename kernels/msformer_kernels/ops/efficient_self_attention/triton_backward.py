"""Folded efficient self-attention in Triton, backward; the names are those of triton_kernels.py.

`self_attention_query_backward_kernel` recomputes P = rho_q, writes the gradient of the queries and reduces dM = P^T dY
over a split; `self_attention_fold_backward_kernel` turns dM into dG, dA and delta_j = <A_j, dA_j>, the closed form of
sum_n S_nj dS_nj; `self_attention_token_backward_kernel` recomputes S, writes the gradient of the keys and dx (through
LayerNorm and residual); `self_attention_weight_gradient_kernel` reduces dW_q and dW_k from the two gradients. Summed up
in the kernels before it, each would hold a second C x C accumulator, for which there are no registers (at C = 100 both
spilled).

Operands of products are rounded as in the forward. Where gradients are summed over all tokens (dA), float16 could
overflow: products with those take float32 operands then.
"""

from __future__ import annotations

import triton
import triton.language as tl

from msformer_kernels.ops.efficient_self_attention.triton_kernels import head_softmax, load_kept, load_tokens
from msformer_kernels.triton.tiles import (
    aligned,
    dot,
    load_operand,
    load_tile,
    load_vector,
    normalize_rows,
    normalize_rows_backward,
    operand,
    softmax_rows_backward,
    store_tile,
)


@triton.jit
def self_attention_query_backward_kernel(
    x_ptr,  # [B, N, C], strided
    grad_output_ptr,  # [B, N, C], strided
    norm_weight_ptr,
    norm_bias_ptr,
    query_weight_ptr,  # [D, C]
    query_bias_ptr,
    folded_ptr,  # [B, D, C]
    grad_projected_ptr,  # [B, N, 2D]: gradients of queries and keys
    partial_ptr,  # [B, splits, size]: dM [D, C], db_o [C]
    tokens,
    channels: tl.constexpr,
    head_keys: tl.constexpr,
    split_size,
    eps,
    x_stride_b,
    x_stride_n,
    x_stride_c,
    grad_stride_b,
    grad_stride_n,
    grad_stride_c,
    NORM: tl.constexpr,
    NORM_BIAS: tl.constexpr,
    QUERY_BIAS: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
):
    x_stride_b = aligned(x_stride_b, ALIGN)
    x_stride_n = aligned(x_stride_n, ALIGN)
    grad_stride_b = aligned(grad_stride_b, ALIGN)
    grad_stride_n = aligned(grad_stride_n, ALIGN)
    batch = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    head = tl.program_id(2)
    keys = tl.num_programs(2) * head_keys
    columns = tl.arange(0, BC)
    features = tl.arange(0, BD)
    x_ptr += batch * x_stride_b
    grad_output_ptr += batch * grad_stride_b
    folded_ptr += (batch * keys + head * head_keys) * channels
    folded = tl.trans(load_operand(folded_ptr, features, columns, channels, 1, head_keys, channels))  # [BC, BD]
    grad_projected_ptr += batch * tokens * 2 * keys + head * head_keys
    grad_folded = tl.zeros([BD, BC], tl.float32)
    grad_output_bias = tl.zeros([BC], tl.float32)
    first = split * split_size
    for start in range(first, tl.minimum(first + split_size, tokens), BN):
        rows = start + tl.arange(0, BN)
        x, _, _ = load_tokens(x_ptr, norm_weight_ptr, norm_bias_ptr, rows, columns, x_stride_n, x_stride_c, tokens,
                              channels, eps, NORM, NORM_BIAS)  # fmt: skip
        weights = head_softmax(x, query_weight_ptr, query_bias_ptr, head, features, columns, head_keys, channels,
                                  QUERY_BIAS, OPERAND, PRECISION)  # fmt: skip
        # loaded not before it is needed: as an operand, every warp holds it
        grad_output = load_tile(grad_output_ptr, rows, columns, grad_stride_n, grad_stride_c, tokens, channels)
        grad_folded += dot(tl.trans(weights), grad_output, OPERAND, PRECISION)
        grad_weights = dot(grad_output, folded, OPERAND, PRECISION, True)  # [BN, BD]
        grad_query = softmax_rows_backward(weights, grad_weights)
        store_tile(grad_projected_ptr, grad_query, rows, features, 2 * keys, 1, tokens, head_keys)
        grad_output_bias += tl.sum(grad_output, 0)
    partial = partial_ptr + (batch * tl.num_programs(1) + split) * (keys * channels + channels)
    head_rows = head * head_keys * channels
    store_tile(partial + head_rows, grad_folded, features, columns, channels, 1, head_keys, channels)
    if head == 0:
        tl.store(partial + keys * channels + columns, grad_output_bias, mask=columns < channels)


@triton.jit
def self_attention_fold_backward_kernel(
    grad_folded_ptr,  # [B, D, C], images batch_stride apart
    grad_context_ptr,  # [B, D, V / heads], of the context that was returned
    key_tokens_ptr,  # [B, D, C]
    value_weight_ptr,  # [V, C]
    output_weight_ptr,  # [C, V]
    grad_context_sum_ptr,  # [B, D, V / heads]
    grad_key_tokens_ptr,  # [B, D, C]
    delta_ptr,  # [B, D]
    batch_stride,
    channels: tl.constexpr,
    head_keys: tl.constexpr,
    head_values: tl.constexpr,
    GRAD_CONTEXT: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKEN_PRECISION: tl.constexpr,  # of the products with dA
):
    """Some rows of one head: dG = dM W_o^T + the gradient of the returned context, dA = dG W_v^T, delta = <A, dA>."""
    batch = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    rows = tl.program_id(2) * BR + tl.arange(0, BR)
    columns = tl.arange(0, BC)
    row = (batch * heads + head) * head_keys
    grad_folded_ptr += batch * batch_stride + head * head_keys * channels
    grad_folded = load_tile(grad_folded_ptr, rows, columns, channels, 1, head_keys, channels)  # [BR, BC]
    output_weight_ptr += head * head_values
    value_weight_ptr += head * head_values * channels
    grad_context_ptr += row * head_values
    grad_context_sum_ptr += row * head_values
    grad_key_tokens = tl.zeros([BR, BC], tl.float32)
    for first in range(0, head_values, BV):
        values = first + tl.arange(0, BV)
        output_weight = load_tile(output_weight_ptr, columns, values, heads * head_values, 1, channels, head_values)
        grad_context = dot(grad_folded, output_weight, tl.float32, PRECISION)  # [BR, BV]
        if GRAD_CONTEXT:
            grad_context += load_tile(grad_context_ptr, rows, values, head_values, 1, head_keys, head_values)
        store_tile(grad_context_sum_ptr, grad_context, rows, values, head_values, 1, head_keys, head_values)
        value_weight = load_tile(value_weight_ptr, values, columns, channels, 1, head_values, channels)  # [BV, BC]
        grad_key_tokens += dot(grad_context, value_weight, tl.float32, PRECISION)
    # delta is subtracted from products with these rows, most of which it cancels: both must see the same rounding
    grad_key_tokens = operand(grad_key_tokens, grad_key_tokens_ptr.dtype.element_ty, TOKEN_PRECISION).to(tl.float32)
    key_tokens = load_tile(key_tokens_ptr + row * channels, rows, columns, channels, 1, head_keys, channels)
    at = grad_key_tokens_ptr + row * channels
    store_tile(at, grad_key_tokens, rows, columns, channels, 1, head_keys, channels)
    tl.store(delta_ptr + row + rows, tl.sum(key_tokens * grad_key_tokens, 1), mask=rows < head_keys)


@triton.jit
def self_attention_token_backward_kernel(
    x_ptr,  # [B, N, C], strided
    grad_output_ptr,  # [B, N, C], strided
    grad_projected_ptr,  # [B, N, 2D]: gradients of the queries; those of the keys are written
    norm_weight_ptr,
    norm_bias_ptr,
    query_weight_ptr,  # [D, C]
    key_weight_ptr,  # [D, C]
    grad_key_tokens_ptr,  # [B, D, C], in SUM_OPERAND
    delta_ptr,  # [B, D]
    max_ptr,  # [B, D]
    sum_ptr,
    mask_ptr,  # [B, N] bytes
    grad_x_ptr,  # [B, N, C]
    partial_ptr,  # [B * splits, 2, C]: gradients of the norm's weight and bias
    tokens,
    channels: tl.constexpr,
    keys: tl.constexpr,
    split_size,
    eps,
    x_stride_b,
    x_stride_n,
    x_stride_c,
    grad_stride_b,
    grad_stride_n,
    grad_stride_c,
    mask_stride_b,
    mask_stride_n,
    NORM: tl.constexpr,
    NORM_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    MASKED: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    OPERAND: tl.constexpr,
    SUM_OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
):
    x_stride_b = aligned(x_stride_b, ALIGN)
    x_stride_n = aligned(x_stride_n, ALIGN)
    grad_stride_b = aligned(grad_stride_b, ALIGN)
    grad_stride_n = aligned(grad_stride_n, ALIGN)
    batch = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    columns = tl.arange(0, BC)
    x_ptr += batch * x_stride_b
    grad_output_ptr += batch * grad_stride_b
    grad_projected_ptr += batch * tokens * 2 * keys
    grad_x_ptr += batch * tokens * channels
    mask_ptr += batch * mask_stride_b
    grad_key_tokens_ptr += batch * keys * channels
    norm_weight = load_vector(norm_weight_ptr, columns, channels, NORM, 1.0)
    grad_norm_weight = tl.zeros([BC], tl.float32)
    grad_norm_bias = tl.zeros([BC], tl.float32)
    first = split * split_size
    for start in range(first, tl.minimum(first + split_size, tokens), BN):
        rows = start + tl.arange(0, BN)
        x, _, _ = load_tokens(x_ptr, norm_weight_ptr, norm_bias_ptr, rows, columns, x_stride_n, x_stride_c, tokens,
                              channels, eps, NORM, NORM_BIAS)  # fmt: skip
        kept = load_kept(mask_ptr, rows, mask_stride_n, tokens, MASKED)
        if MASKED:
            x = tl.where(kept[:, None], x, 0.0)
        grad_x = tl.zeros([BN, BC], tl.float32)
        for feature in range(0, keys, BD):
            features = feature + tl.arange(0, BD)
            statistics = batch * keys + features
            delta = tl.load(delta_ptr + statistics, mask=features < keys, other=0.0)
            largest = tl.load(max_ptr + statistics, mask=features < keys, other=0.0)
            shift = tl.where(largest == float("-inf"), 0.0, largest)
            total = tl.load(sum_ptr + statistics, mask=features < keys, other=1.0)
            inverse = tl.where(features < keys, 1.0 / tl.where(total == 0.0, 1.0, total), 0.0)
            key_weight = load_operand(key_weight_ptr, features, columns, channels, 1, keys, channels)  # [BD, BC]
            logits = dot(x, tl.trans(key_weight), OPERAND, PRECISION, True)  # [BN, BD]
            if ONE_TILE:  # the softmax of the tile itself: rounding errors cancel, one token has exactly all the weight
                logits = tl.where(kept[:, None], logits, float("-inf"))
                largest = tl.max(logits, 0)
                weights = tl.exp(logits - tl.where(largest == float("-inf"), 0.0, largest)[None, :])
                total = tl.sum(weights, 0)
                weights = weights / tl.where(total == 0.0, 1.0, total)[None, :]
            else:
                weights = tl.where(kept[:, None], tl.exp(logits - shift[None, :]) * inverse[None, :], 0.0)
            grad_key_tokens = load_operand(grad_key_tokens_ptr, features, columns, channels, 1, keys, channels)
            grad_weights = dot(x, tl.trans(grad_key_tokens), SUM_OPERAND, PRECISION, True)
            if ONE_TILE:
                delta = tl.sum(weights * grad_weights, 0)
            grad_key = weights * (grad_weights - delta[None, :])
            store_tile(grad_projected_ptr + keys, grad_key, rows, features, 2 * keys, 1, tokens, keys)
            grad_x += dot(weights, grad_key_tokens, SUM_OPERAND, PRECISION, True)
            grad_x += dot(grad_key, key_weight, OPERAND, PRECISION, True)
            grad_query = load_tile(grad_projected_ptr, rows, features, 2 * keys, 1, tokens, keys)
            query_weight = load_operand(query_weight_ptr, features, columns, channels, 1, keys, channels)
            grad_x += dot(grad_query, query_weight, OPERAND, PRECISION, True)
        if NORM:  # made again: kept from above, it would cost the registers of the products
            x = load_tile(x_ptr, rows, columns, x_stride_n, x_stride_c, tokens, channels)
            normalized, rstd = normalize_rows(x, columns, channels, eps)
            grad_norm_weight += tl.sum(grad_x * normalized, 0)
            grad_norm_bias += tl.sum(grad_x, 0)
            grad_x = normalize_rows_backward(grad_x, normalized, rstd, norm_weight, channels)
        if RESIDUAL:
            grad_x += load_tile(grad_output_ptr, rows, columns, grad_stride_n, grad_stride_c, tokens, channels)
        store_tile(grad_x_ptr, grad_x, rows, columns, channels, 1, tokens, channels)
    partial = partial_ptr + (batch * tl.num_programs(1) + split) * 2 * channels
    tl.store(partial + columns, grad_norm_weight, mask=columns < channels)
    tl.store(partial + channels + columns, grad_norm_bias, mask=columns < channels)


@triton.jit
def self_attention_weight_gradient_kernel(
    x_ptr,  # [B, N, C], strided
    grad_projected_ptr,  # [B, N, D]
    norm_weight_ptr,
    norm_bias_ptr,
    partial_ptr,  # [B * splits, size]: gradients of weight [D, C] and bias [D]
    tokens,
    channels: tl.constexpr,
    projected: tl.constexpr,
    split_size,
    eps,
    x_stride_b,
    x_stride_n,
    x_stride_c,
    NORM: tl.constexpr,
    NORM_BIAS: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Of linear layers of x (after its norm), side by side."""
    x_stride_b = aligned(x_stride_b, ALIGN)
    x_stride_n = aligned(x_stride_n, ALIGN)
    batch = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    columns = tl.arange(0, BC)
    features = tl.program_id(2) * BD + tl.arange(0, BD)
    x_ptr += batch * x_stride_b
    grad_projected_ptr += batch * tokens * projected
    grad_weight = tl.zeros([BD, BC], tl.float32)
    grad_bias = tl.zeros([BD], tl.float32)
    first = split * split_size
    for start in range(first, tl.minimum(first + split_size, tokens), BN):
        rows = start + tl.arange(0, BN)
        x, _, _ = load_tokens(x_ptr, norm_weight_ptr, norm_bias_ptr, rows, columns, x_stride_n, x_stride_c, tokens,
                              channels, eps, NORM, NORM_BIAS)  # fmt: skip
        grad = load_tile(grad_projected_ptr, rows, features, projected, 1, tokens, projected)  # [BN, BD]
        grad_weight += dot(tl.trans(grad), x, OPERAND, PRECISION)
        grad_bias += tl.sum(grad, 0)
    partial = partial_ptr + (batch * tl.num_programs(1) + split) * (projected * channels + projected)
    store_tile(partial, grad_weight, features, columns, channels, 1, projected, channels)
    tl.store(partial + projected * channels + features, grad_bias, mask=features < projected)
