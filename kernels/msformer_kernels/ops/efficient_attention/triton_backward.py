"""Efficient attention on query, key, value in Triton, backward; see triton_kernels.py.

`attention_query_gradient_kernel` makes the gradient of the queries, and two statistics a query;
`attention_context_gradient_kernel` and `attention_combine_gradient_kernel` reduce over the queries;
`attention_key_gradient_kernel` makes the gradients of keys and values. Weights are recomputed, products are of float32
operands.
"""

from __future__ import annotations

import triton
import triton.language as tl

from msformer_kernels.ops.efficient_attention.triton_kernels import (
    product_with_context,
    query_statistics,
    query_weights,
)
from msformer_kernels.triton.tiles import aligned, dot, load_tile, softmax_rows_backward, store_tile


@triton.jit
def attention_query_gradient_kernel(
    query_ptr,  # [B, heads, N, D], strided
    grad_output_ptr,  # [B, heads, N, V], strided
    context_ptr,  # [B * heads, D, V]
    length_ptr,  # [B]
    grad_query_ptr,  # [B, heads, N, D], strided
    shift_ptr,  # [B * heads, N]: the weights of a query are exp(logit - shift) * factor
    factor_ptr,
    heads,
    tokens,
    key_channels: tl.constexpr,
    value_channels: tl.constexpr,
    query_scale,
    output_scale,
    query_stride_b,
    query_stride_h,
    query_stride_n,
    query_stride_c,
    grad_stride_b,
    grad_stride_h,
    grad_stride_n,
    grad_stride_c,
    grad_query_stride_b,
    grad_query_stride_h,
    grad_query_stride_n,
    grad_query_stride_c,
    SOFTMAX: tl.constexpr,
    BY_LENGTH: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
):
    query_stride_b = aligned(query_stride_b, ALIGN)
    query_stride_h = aligned(query_stride_h, ALIGN)
    query_stride_n = aligned(query_stride_n, ALIGN)
    grad_stride_b = aligned(grad_stride_b, ALIGN)
    grad_stride_h = aligned(grad_stride_h, ALIGN)
    grad_stride_n = aligned(grad_stride_n, ALIGN)
    grad_query_stride_b = aligned(grad_query_stride_b, ALIGN)
    grad_query_stride_h = aligned(grad_query_stride_h, ALIGN)
    grad_query_stride_n = aligned(grad_query_stride_n, ALIGN)
    token_tiles = tl.cdiv(tokens, BN)
    pair = (tl.program_id(0) // token_tiles).to(tl.int64)
    rows = tl.program_id(0) % token_tiles * BN + tl.arange(0, BN)
    batch = pair // heads
    if BY_LENGTH:
        query_scale = query_scale / tl.sqrt(tl.maximum(tl.load(length_ptr + batch), 1).to(tl.float32))
    query_ptr += batch * query_stride_b + pair % heads * query_stride_h
    grad_output_ptr += batch * grad_stride_b + pair % heads * grad_stride_h
    grad_query_ptr += batch * grad_query_stride_b + pair % heads * grad_query_stride_h
    context_ptr += pair * key_channels * value_channels
    shift, factor = query_statistics(query_ptr, rows, query_stride_n, query_stride_c, tokens, key_channels, query_scale,
                                     SOFTMAX, BN, BD)  # fmt: skip
    mean = tl.zeros([BN], tl.float32)  # of the gradients of the weights, under the weights
    if SOFTMAX and key_channels > BD:
        for start in range(0, key_channels, BD):
            features = start + tl.arange(0, BD)
            weights = query_weights(query_ptr, rows, features, query_stride_n, query_stride_c, tokens, key_channels,
                                    query_scale, shift, factor, SOFTMAX)  # fmt: skip
            grad = product_with_context(grad_output_ptr, context_ptr, rows, features, grad_stride_n, grad_stride_c,
                                        tokens, key_channels, value_channels, BN, BD, BV, PRECISION)  # fmt: skip
            mean += tl.sum(weights * grad, 1)
    for start in range(0, key_channels, BD):
        features = start + tl.arange(0, BD)
        grad = product_with_context(grad_output_ptr, context_ptr, rows, features, grad_stride_n, grad_stride_c, tokens,
                                    key_channels, value_channels, BN, BD, BV, PRECISION)  # fmt: skip
        if SOFTMAX:
            weights = query_weights(query_ptr, rows, features, query_stride_n, query_stride_c, tokens, key_channels,
                                    query_scale, shift, factor, SOFTMAX)  # fmt: skip
            if key_channels > BD:
                grad = weights * (grad - mean[:, None])
            else:
                grad = softmax_rows_backward(weights, grad)
        grad *= output_scale * query_scale
        store_tile(grad_query_ptr, grad, rows, features, grad_query_stride_n, grad_query_stride_c, tokens, key_channels)
    tl.store(shift_ptr + pair * tokens + rows, shift, mask=rows < tokens)
    tl.store(factor_ptr + pair * tokens + rows, factor, mask=rows < tokens)


@triton.jit
def attention_context_gradient_kernel(
    query_ptr,  # [B, heads, N, D], strided
    grad_output_ptr,  # [B, heads, N, V], strided
    shift_ptr,  # [B * heads, N]
    factor_ptr,
    partial_ptr,  # [B * heads, splits, D, V]
    heads,
    tokens,
    key_channels: tl.constexpr,
    value_channels: tl.constexpr,
    split_size,
    query_scale,
    output_scale,
    query_stride_b,
    query_stride_h,
    query_stride_n,
    query_stride_c,
    grad_stride_b,
    grad_stride_h,
    grad_stride_n,
    grad_stride_c,
    SOFTMAX: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
):
    query_stride_b = aligned(query_stride_b, ALIGN)
    query_stride_h = aligned(query_stride_h, ALIGN)
    query_stride_n = aligned(query_stride_n, ALIGN)
    grad_stride_b = aligned(grad_stride_b, ALIGN)
    grad_stride_h = aligned(grad_stride_h, ALIGN)
    grad_stride_n = aligned(grad_stride_n, ALIGN)
    pair = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    value_tiles = tl.cdiv(value_channels, BV)
    features = tl.program_id(2) // value_tiles * BD + tl.arange(0, BD)
    columns = tl.program_id(2) % value_tiles * BV + tl.arange(0, BV)
    batch = pair // heads
    query_ptr += batch * query_stride_b + pair % heads * query_stride_h
    grad_output_ptr += batch * grad_stride_b + pair % heads * grad_stride_h
    total = tl.zeros([BD, BV], tl.float32)
    first = split * split_size
    for start in range(first, tl.minimum(first + split_size, tokens), BN):
        rows = start + tl.arange(0, BN)
        inside = rows < tokens
        shift = tl.load(shift_ptr + pair * tokens + rows, mask=inside, other=0.0)
        factor = tl.load(factor_ptr + pair * tokens + rows, mask=inside, other=0.0)
        query = load_tile(query_ptr, rows, features, query_stride_n, query_stride_c, tokens, key_channels)
        grad = load_tile(grad_output_ptr, rows, columns, grad_stride_n, grad_stride_c, tokens, value_channels)
        if SOFTMAX:
            query = tl.exp(query * query_scale - shift[:, None])
        total += dot(tl.trans(query * factor[:, None]), grad, tl.float32, PRECISION)
    store_tile(
        partial_ptr + (pair * tl.num_programs(1) + split) * key_channels * value_channels,
        total * output_scale,
        features,
        columns,
        value_channels,
        1,
        key_channels,
        value_channels,
    )


@triton.jit
def attention_combine_gradient_kernel(
    partial_ptr,  # [groups, splits, D, V]
    added_ptr,  # [groups, D, V]
    context_ptr,  # [groups, D, V]
    out_ptr,  # [groups, D, V]
    delta_ptr,  # [groups, D]: <context, out> of each key feature
    splits,
    key_channels: tl.constexpr,
    value_channels: tl.constexpr,
    ADDED: tl.constexpr,
    BS: tl.constexpr,
    BV: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1)
    columns = tl.arange(0, BV)
    total = tl.zeros([BV], tl.float32)
    for start in range(0, splits, BS):
        index = start + tl.arange(0, BS)
        rows = (group * splits + index) * key_channels + feature
        partial = tl.load(
            partial_ptr + rows[:, None] * value_channels + columns[None, :],
            mask=(index < splits)[:, None] & (columns < value_channels)[None, :],
            other=0.0,
        )
        total += tl.sum(partial, 0)
    at = (group * key_channels + feature) * value_channels + columns
    if ADDED:
        total += tl.load(added_ptr + at, mask=columns < value_channels, other=0.0)
    context = tl.load(context_ptr + at, mask=columns < value_channels, other=0.0)
    tl.store(out_ptr + at, total, mask=columns < value_channels)
    tl.store(delta_ptr + group * key_channels + feature, tl.sum(context * total, 0))


@triton.jit
def key_weights(key_ptr, max_ptr, sum_ptr, rows, features, kept, stride_n, stride_c, tokens, key_channels, scale,
                SOFTMAX: tl.constexpr):  # fmt: skip
    """rho_k of rows for some features, zeros for tokens that are not kept; and 1 / sum of each feature."""
    key = load_tile(key_ptr, rows, features, stride_n, stride_c, tokens, key_channels) * scale  # [BN, BD]
    total = tl.load(sum_ptr + features, mask=features < key_channels, other=1.0)
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    if SOFTMAX:
        largest = tl.load(max_ptr + features, mask=features < key_channels, other=0.0)
        key = tl.exp(key - tl.where(largest == float("-inf"), 0.0, largest)[None, :])
    inside = kept[:, None] & (features < key_channels)[None, :]
    return tl.where(inside, key * inverse[None, :], 0.0), inverse


@triton.jit
def attention_key_gradient_kernel(
    key_ptr,  # [B, heads, N, D], strided
    value_ptr,  # [B, heads, N, V], strided
    mask_ptr,  # [B, N] bytes
    max_ptr,  # [B * heads, D]
    sum_ptr,
    grad_context_ptr,  # [B * heads, D, V]
    delta_ptr,  # [B * heads, D]
    grad_key_ptr,  # [B, heads, N, D], strided
    grad_value_ptr,  # [B, heads, N, V], strided
    heads,
    tokens,
    key_channels: tl.constexpr,
    value_channels: tl.constexpr,
    key_scale,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    key_stride_c,
    value_stride_b,
    value_stride_h,
    value_stride_n,
    value_stride_c,
    mask_stride_b,
    mask_stride_n,
    grad_key_stride_b,
    grad_key_stride_h,
    grad_key_stride_n,
    grad_key_stride_c,
    grad_value_stride_b,
    grad_value_stride_h,
    grad_value_stride_n,
    grad_value_stride_c,
    SOFTMAX: tl.constexpr,
    MASKED: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
):
    key_stride_b = aligned(key_stride_b, ALIGN)
    key_stride_h = aligned(key_stride_h, ALIGN)
    key_stride_n = aligned(key_stride_n, ALIGN)
    value_stride_b = aligned(value_stride_b, ALIGN)
    value_stride_h = aligned(value_stride_h, ALIGN)
    value_stride_n = aligned(value_stride_n, ALIGN)
    grad_key_stride_b = aligned(grad_key_stride_b, ALIGN)
    grad_key_stride_h = aligned(grad_key_stride_h, ALIGN)
    grad_key_stride_n = aligned(grad_key_stride_n, ALIGN)
    grad_value_stride_b = aligned(grad_value_stride_b, ALIGN)
    grad_value_stride_h = aligned(grad_value_stride_h, ALIGN)
    grad_value_stride_n = aligned(grad_value_stride_n, ALIGN)
    token_tiles = tl.cdiv(tokens, BN)
    pair = (tl.program_id(0) // token_tiles).to(tl.int64)
    rows = tl.program_id(0) % token_tiles * BN + tl.arange(0, BN)
    batch = pair // heads
    key_ptr += batch * key_stride_b + pair % heads * key_stride_h
    value_ptr += batch * value_stride_b + pair % heads * value_stride_h
    max_ptr += pair * key_channels
    sum_ptr += pair * key_channels
    grad_context_ptr += pair * key_channels * value_channels
    kept = rows < tokens
    if MASKED:
        bytes = tl.load(mask_ptr + batch * mask_stride_b + rows.to(tl.int64) * mask_stride_n, mask=kept, other=0)
        kept = kept & (bytes != 0)
    feature_tiles = tl.cdiv(key_channels, BD)
    tile = tl.program_id(1)
    if tile < feature_tiles:
        features = tile * BD + tl.arange(0, BD)
        weights, inverse = key_weights(key_ptr, max_ptr, sum_ptr, rows, features, kept, key_stride_n, key_stride_c,
                                       tokens, key_channels, key_scale, SOFTMAX)  # fmt: skip
        grad = product_with_context(value_ptr, grad_context_ptr, rows, features, value_stride_n, value_stride_c, tokens,
                                    key_channels, value_channels, BN, BD, BV, PRECISION)  # fmt: skip
        if SOFTMAX:
            if ONE_TILE:  # rounding errors cancel, and one token with all the weight gets exactly no gradient
                delta = tl.sum(weights * grad, 0)
            else:
                delta = tl.load(delta_ptr + pair * key_channels + features, mask=features < key_channels, other=0.0)
            grad = weights * (grad - delta[None, :])
        else:
            grad *= inverse[None, :]
        grad = tl.where(kept[:, None], grad * key_scale, 0.0)
        grad_key_ptr += batch * grad_key_stride_b + pair % heads * grad_key_stride_h
        store_tile(grad_key_ptr, grad, rows, features, grad_key_stride_n, grad_key_stride_c, tokens, key_channels)
    else:
        columns = (tile - feature_tiles) * BV + tl.arange(0, BV)
        grad_value = tl.zeros([BN, BV], tl.float32)
        for start in range(0, key_channels, BD):
            features = start + tl.arange(0, BD)
            weights, _ = key_weights(key_ptr, max_ptr, sum_ptr, rows, features, kept, key_stride_n, key_stride_c,
                                     tokens, key_channels, key_scale, SOFTMAX)  # fmt: skip
            context = load_tile(grad_context_ptr, features, columns, value_channels, 1, key_channels, value_channels)
            grad_value += dot(weights, context, tl.float32, PRECISION)
        if MASKED:  # whatever came out of other tokens
            grad_value = tl.where(kept[:, None], grad_value, 0.0)
        grad_value_ptr += batch * grad_value_stride_b + pair % heads * grad_value_stride_h
        store_tile(
            grad_value_ptr, grad_value, rows, columns, grad_value_stride_n, grad_value_stride_c, tokens, value_channels
        )
