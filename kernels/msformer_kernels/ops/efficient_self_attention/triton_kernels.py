"""Folded efficient self-attention in Triton, forward, for up to 128 channels and key features.

With X the layer-normed tokens of an image:

    S = rho_k(X W_k)      A = S^T X      G_h = A_h W_v,h + b_v,h      M_h = G_h W_o,h
    Y = rho_q(X W_q + b_q) M + b_o [+ x]

`self_attention_key_tokens_kernel` reads x and makes the partial A of a split with an online softmax;
`attention_combine_kernel` adds the splits; `self_attention_fold_kernel` makes G and M, which are small;
`self_attention_output_kernel` reads x again and writes Y. 3NC values are moved, 8NC^2 flop done. Queries, keys and both
softmaxes live in registers.

Operands of products are rounded to the dtype of x (float32: see `dot_precision`), weights and M before these kernels;
sums, statistics, A and G are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from msformer_kernels.triton.tiles import (
    aligned,
    dot,
    load_operand,
    load_tile,
    load_vector,
    normalize_rows,
    operand,
    store_tile,
)


@triton.jit
def load_tokens(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    rows,
    columns,
    stride_n,
    stride_c,
    tokens,
    channels,
    eps,
    NORM: tl.constexpr,
    NORM_BIAS: tl.constexpr,
):
    """Tokens after the norm; before its weight and bias; and 1 / deviation of each (x itself and 1 without a norm)."""
    x = load_tile(x_ptr, rows, columns, stride_n, stride_c, tokens, channels)  # [BN, BC]
    if NORM:
        normalized, rstd = normalize_rows(x, columns, channels, eps)
        weight = load_vector(norm_weight_ptr, columns, channels, True, 0.0)
        bias = load_vector(norm_bias_ptr, columns, channels, NORM_BIAS, 0.0)
        return normalized * weight[None, :] + bias[None, :], normalized, rstd
    else:
        return x, x, tl.sum(x, 1)


@triton.jit
def load_kept(mask_ptr, rows, stride_n, tokens, MASKED: tl.constexpr):
    """Which rows are tokens that the mask keeps."""
    kept = rows < tokens
    if MASKED:
        kept = kept & (tl.load(mask_ptr + rows.to(tl.int64) * stride_n, mask=kept, other=0) != 0)
    return kept


@triton.jit
def head_softmax(x, weight_ptr, bias_ptr, head, features, columns, head_keys, channels, BIAS: tl.constexpr,
                 OPERAND: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """rho_q of one head: [BN, BD], zeros in the padding."""
    weight_ptr += head * head_keys * channels
    weight = load_operand(weight_ptr, features, columns, channels, 1, head_keys, channels)
    logits = dot(x, tl.trans(weight), OPERAND, PRECISION, True)
    logits += load_vector(bias_ptr + head * head_keys, features, head_keys, BIAS, 0.0)[None, :]
    logits = tl.where((features < head_keys)[None, :], logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def self_attention_key_tokens_kernel(
    x_ptr,  # [B, N, C], strided
    norm_weight_ptr,  # [C]
    norm_bias_ptr,
    key_weight_ptr,  # [D, C]
    mask_ptr,  # [B, N] bytes
    max_ptr,  # [B, splits, D]
    sum_ptr,
    partial_ptr,  # [B, splits, D, C]
    tokens,
    channels: tl.constexpr,
    keys: tl.constexpr,
    split_size,
    eps,
    x_stride_b,
    x_stride_n,
    x_stride_c,
    mask_stride_b,
    mask_stride_n,
    NORM: tl.constexpr,
    NORM_BIAS: tl.constexpr,
    MASKED: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
):
    x_stride_b = aligned(x_stride_b, ALIGN)
    x_stride_n = aligned(x_stride_n, ALIGN)
    batch = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    features = tl.program_id(2) * BD + tl.arange(0, BD)
    columns = tl.arange(0, BC)
    x_ptr += batch * x_stride_b
    mask_ptr += batch * mask_stride_b
    key_weight = tl.trans(load_operand(key_weight_ptr, features, columns, channels, 1, keys, channels))  # [BC, BD]
    largest = tl.full([BD], float("-inf"), tl.float32)
    total = tl.zeros([BD], tl.float32)
    key_tokens = tl.zeros([BD, BC], tl.float32)
    first = split * split_size
    for start in range(first, tl.minimum(first + split_size, tokens), BN):
        rows = start + tl.arange(0, BN)
        x, _, _ = load_tokens(x_ptr, norm_weight_ptr, norm_bias_ptr, rows, columns, x_stride_n, x_stride_c, tokens,
                              channels, eps, NORM, NORM_BIAS)  # fmt: skip
        kept = load_kept(mask_ptr, rows, mask_stride_n, tokens, MASKED)
        if MASKED:
            x = tl.where(kept[:, None], x, 0.0)
        logits = dot(x, key_weight, OPERAND, PRECISION, True)  # [BN, BD]
        logits = tl.where(kept[:, None], logits, float("-inf"))
        before = largest
        largest = tl.maximum(before, tl.max(logits, 0))
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        rescale = tl.exp(before - shift)
        weights = tl.exp(logits - shift[None, :])
        total = total * rescale + tl.sum(weights, 0)
        key_tokens = key_tokens * rescale[:, None] + dot(tl.trans(weights), x, OPERAND, PRECISION)
    row = batch * tl.num_programs(1) + split
    tl.store(max_ptr + row * keys + features, largest, mask=features < keys)
    tl.store(sum_ptr + row * keys + features, total, mask=features < keys)
    store_tile(partial_ptr + row * keys * channels, key_tokens, features, columns, channels, 1, keys, channels)


@triton.jit
def self_attention_fold_kernel(
    key_tokens_ptr,  # [B, D, C]
    value_weight_ptr,  # [V, C]
    value_bias_ptr,  # [V]
    output_weight_ptr,  # [C, V]
    length_ptr,  # [B]: tokens that are kept
    context_ptr,  # [B, D, V / heads], made from key_tokens, or given
    folded_ptr,  # [B, D, C]
    channels: tl.constexpr,
    head_keys: tl.constexpr,
    head_values: tl.constexpr,
    MAKE_CONTEXT: tl.constexpr,
    VALUE_BIAS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BO: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKEN_PRECISION: tl.constexpr,  # of the products with M
):
    """Some rows and BO columns of one head: G = A W_v + b_v and M = G W_o. G is made for every tile of columns: more
    products, but four times as many programs, each of which waits for less."""
    batch = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    row_tiles = tl.cdiv(head_keys, BR)
    rows = tl.program_id(2) % row_tiles * BR + tl.arange(0, BR)
    columns = tl.arange(0, BC)
    outputs = tl.program_id(2) // row_tiles * BO + tl.arange(0, BO)
    row = (batch * heads + head) * head_keys
    context_ptr += row * head_values
    if MAKE_CONTEXT:
        key_tokens = load_tile(key_tokens_ptr + row * channels, rows, columns, channels, 1, head_keys, channels)
    value_weight_ptr += head * head_values * channels
    output_weight_ptr += head * head_values
    any_kept = tl.load(length_ptr + batch) > 0
    folded = tl.zeros([BR, BO], tl.float32)
    for first in range(0, head_values, BV):
        values = first + tl.arange(0, BV)
        if MAKE_CONTEXT:
            value_weight = load_tile(value_weight_ptr, columns, values, 1, channels, channels, head_values)  # [BC, BV]
            context = dot(key_tokens, value_weight, tl.float32, PRECISION)
            bias = load_vector(value_bias_ptr + head * head_values, values, head_values, VALUE_BIAS, 0.0)
            # the columns of S sum to 1, or, without tokens, to 0
            context += tl.where(any_kept, bias, 0.0)[None, :]
            if tl.program_id(2) < row_tiles:
                store_tile(context_ptr, context, rows, values, head_values, 1, head_keys, head_values)
        else:
            context = load_tile(context_ptr, rows, values, head_values, 1, head_keys, head_values)
        output_weight = load_tile(output_weight_ptr, values, outputs, 1, heads * head_values, head_values, channels)
        folded += dot(context, output_weight, tl.float32, PRECISION)
    folded = operand(folded, folded_ptr.dtype.element_ty, TOKEN_PRECISION)
    store_tile(folded_ptr + row * channels, folded, rows, outputs, channels, 1, head_keys, channels)


@triton.jit
def self_attention_output_kernel(
    x_ptr,  # [B, N, C], strided
    norm_weight_ptr,
    norm_bias_ptr,
    query_weight_ptr,  # [D, C]
    query_bias_ptr,
    folded_ptr,  # [B, D, C]
    output_bias_ptr,  # [C]
    output_ptr,  # [B, N, C]
    tokens,
    channels: tl.constexpr,
    heads,
    head_keys: tl.constexpr,
    eps,
    x_stride_b,
    x_stride_n,
    x_stride_c,
    NORM: tl.constexpr,
    NORM_BIAS: tl.constexpr,
    QUERY_BIAS: tl.constexpr,
    OUTPUT_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
):
    x_stride_b = aligned(x_stride_b, ALIGN)
    x_stride_n = aligned(x_stride_n, ALIGN)
    token_tiles = tl.cdiv(tokens, BN)
    batch = (tl.program_id(0) // token_tiles).to(tl.int64)
    rows = tl.program_id(0) % token_tiles * BN + tl.arange(0, BN)
    columns = tl.arange(0, BC)
    features = tl.arange(0, BD)
    x_ptr += batch * x_stride_b
    x, _, _ = load_tokens(x_ptr, norm_weight_ptr, norm_bias_ptr, rows, columns, x_stride_n, x_stride_c, tokens,
                          channels, eps, NORM, NORM_BIAS)  # fmt: skip
    output = tl.zeros([BN, BC], tl.float32) + load_vector(output_bias_ptr, columns, channels, OUTPUT_BIAS, 0.0)[None, :]
    for head in range(0, heads):
        weights = head_softmax(x, query_weight_ptr, query_bias_ptr, head, features, columns, head_keys, channels,
                                  QUERY_BIAS, OPERAND, PRECISION)  # fmt: skip
        folded = folded_ptr + (batch * heads + head) * head_keys * channels
        folded = load_operand(folded, features, columns, channels, 1, head_keys, channels)  # [BD, BC]
        output += dot(weights, folded, OPERAND, PRECISION, True)
    if RESIDUAL:  # read again: the tile need not stay in registers
        output += load_tile(x_ptr, rows, columns, x_stride_n, x_stride_c, tokens, channels)
    store_tile(output_ptr + batch * tokens * channels, output, rows, columns, channels, 1, tokens, channels)
