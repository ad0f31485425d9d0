"""Efficient attention on query, key, value in Triton, forward: any number of tokens and features, any strides, masks.

    context = rho_k(key)^T value,   output = output_scale * rho_q(query) context

`attention_context_kernel` makes partial sums over a split of the tokens for a tile of the context, with a running
maximum and sum a key feature (online softmax, as FlashAttention over keys); `attention_combine_kernel` adds the splits;
`attention_output_kernel` reads the queries once. Bytes moved: query, key, value and output once each (key and value
once for every tile of 64 features of the other). Everything in between stays in registers.

Products are of float32 operands (see `dot_precision`), since the context and its gradient are float32 whatever comes
in. Without softmax ("scaling") the running maximum is 0 and the sum is the square root of the number of tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from msformer_kernels.triton.tiles import aligned, dot, load_tile, store_tile


@triton.jit
def attention_context_kernel(
    key_ptr,  # [B, heads, N, D], strided
    value_ptr,  # [B, heads, N, V], strided
    mask_ptr,  # [B, N] bytes
    max_ptr,  # [B * heads, splits, D]
    sum_ptr,
    partial_ptr,  # [B * heads, splits, D, V]
    heads,
    tokens,
    key_channels: tl.constexpr,
    value_channels: tl.constexpr,
    split_size,
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
    SOFTMAX: tl.constexpr,
    MASKED: tl.constexpr,
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
    pair = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    value_tiles = tl.cdiv(value_channels, BV)
    features = tl.program_id(2) // value_tiles * BD + tl.arange(0, BD)
    columns = tl.program_id(2) % value_tiles * BV + tl.arange(0, BV)
    batch = pair // heads
    key_ptr += batch * key_stride_b + pair % heads * key_stride_h
    value_ptr += batch * value_stride_b + pair % heads * value_stride_h
    largest = tl.full([BD], float("-inf") if SOFTMAX else 0.0, tl.float32)
    total = tl.zeros([BD], tl.float32)
    context = tl.zeros([BD, BV], tl.float32)
    first = split * split_size
    for start in range(first, tl.minimum(first + split_size, tokens), BN):
        rows = start + tl.arange(0, BN)
        kept = rows < tokens
        if MASKED:
            bytes = tl.load(mask_ptr + batch * mask_stride_b + rows.to(tl.int64) * mask_stride_n, mask=kept, other=0)
            kept = kept & (bytes != 0)
        key = (
            load_tile(key_ptr, rows, features, key_stride_n, key_stride_c, tokens, key_channels) * key_scale
        )  # [BN, BD]
        value = load_tile(value_ptr, rows, columns, value_stride_n, value_stride_c, tokens, value_channels)  # [BN, BV]
        value = tl.where(kept[:, None], value, 0.0)
        if SOFTMAX:
            key = tl.where(kept[:, None], key, float("-inf"))
            before = largest
            largest = tl.maximum(before, tl.max(key, 0))
            shift = tl.where(largest == float("-inf"), 0.0, largest)
            rescale = tl.exp(before - shift)
            key = tl.exp(key - shift[None, :])
            total = total * rescale + tl.sum(key, 0)
            context = context * rescale[:, None]
        else:
            key = tl.where(kept[:, None], key, 0.0)
        context += dot(tl.trans(key), value, tl.float32, PRECISION)
    row = pair * tl.num_programs(1) + split
    if tl.program_id(2) % value_tiles == 0:
        tl.store(max_ptr + row * key_channels + features, largest, mask=features < key_channels)
        tl.store(sum_ptr + row * key_channels + features, total, mask=features < key_channels)
    store_tile(
        partial_ptr + row * key_channels * value_channels,
        context,
        features,
        columns,
        value_channels,
        1,
        key_channels,
        value_channels,
    )


@triton.jit
def attention_combine_kernel(
    max_ptr,  # [groups, splits, D]
    sum_ptr,
    partial_ptr,  # [groups, splits, D, V]
    length_ptr,  # [B]: tokens that are kept
    out_ptr,  # [groups, D, V]
    out_max_ptr,  # [groups, D]
    out_sum_ptr,
    heads,
    splits,
    key_channels: tl.constexpr,
    value_channels: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BS: tl.constexpr,
    BV: tl.constexpr,
):
    """One key feature of one image and head: the sum over splits, in their order, over the sum of weights."""
    group = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1)
    length = tl.load(length_ptr + group // heads)
    statistics = group * splits * key_channels + feature
    lanes = tl.arange(0, BS)
    largest = float("-inf") if SOFTMAX else 0.0
    if SOFTMAX:
        for start in range(0, splits, BS):
            index = start + lanes
            maxima = tl.load(max_ptr + statistics + index * key_channels, mask=index < splits, other=float("-inf"))
            largest = tl.maximum(largest, tl.max(maxima, 0))
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    total = 0.0
    columns = tl.arange(0, BV)
    accumulated = tl.zeros([BV], tl.float32)
    for start in range(0, splits, BS):
        index = start + lanes
        inside = index < splits
        maxima = tl.load(max_ptr + statistics + index * key_channels, mask=inside, other=float("-inf"))
        weight = tl.where(inside, tl.exp(maxima - shift), 0.0)
        total += tl.sum(weight * tl.load(sum_ptr + statistics + index * key_channels, mask=inside, other=0.0), 0)
        rows = (group * splits + index) * key_channels + feature
        partial = tl.load(
            partial_ptr + rows[:, None] * value_channels + columns[None, :],
            mask=inside[:, None] & (columns < value_channels)[None, :],
            other=0.0,
        )
        accumulated += tl.sum(partial * weight[:, None], 0)
    if SOFTMAX:
        # every logit -infinity: NaN, as softmax has it; no token at all: zeros
        total = tl.where((total == 0.0) & (length > 0), float("nan"), total)
    else:
        total = tl.sqrt(length.to(tl.float32))
    result = accumulated / tl.where(total == 0.0, 1.0, total)
    tl.store(
        out_ptr + (group * key_channels + feature) * value_channels + columns, result, mask=columns < value_channels
    )
    tl.store(out_max_ptr + group * key_channels + feature, largest)
    tl.store(out_sum_ptr + group * key_channels + feature, total)


@triton.jit
def query_statistics(query_ptr, rows, stride_n, stride_c, tokens, key_channels, scale, SOFTMAX: tl.constexpr,
                     BN: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """(shift, factor) of rows: their weights rho_q are exp(scale * query - shift) * factor, or query * factor."""
    if SOFTMAX:
        shift = tl.full([BN], float("-inf"), tl.float32)
        total = tl.zeros([BN], tl.float32)
        for start in range(0, key_channels, BD):
            features = start + tl.arange(0, BD)
            logits = load_tile(query_ptr, rows, features, stride_n, stride_c, tokens, key_channels) * scale
            logits = tl.where((features < key_channels)[None, :], logits, float("-inf"))
            before = shift
            shift = tl.maximum(before, tl.max(logits, 1))
            finite = tl.where(shift == float("-inf"), 0.0, shift)
            total = total * tl.exp(before - finite) + tl.sum(tl.exp(logits - finite[:, None]), 1)
        return tl.where(shift == float("-inf"), 0.0, shift), 1.0 / total
    else:
        return tl.zeros([BN], tl.float32), tl.zeros([BN], tl.float32) + scale


@triton.jit
def query_weights(query_ptr, rows, features, stride_n, stride_c, tokens, key_channels, scale, shift, factor,
                  SOFTMAX: tl.constexpr):  # fmt: skip
    """rho_q of rows for some features, zeros in the padding."""
    query = load_tile(query_ptr, rows, features, stride_n, stride_c, tokens, key_channels)  # [BN, BD]
    if SOFTMAX:
        query = tl.where((features < key_channels)[None, :], tl.exp(query * scale - shift[:, None]), 0.0)
    return query * factor[:, None]


@triton.jit
def product_with_context(left_ptr, context_ptr, rows, features, stride_n, stride_c, tokens, key_channels,
                         value_channels, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
                         PRECISION: tl.constexpr):  # fmt: skip
    """Rows [BN, V] of `left` times context^T, for some key features: [BN, BD]."""
    total = tl.zeros([BN, BD], tl.float32)
    for start in range(0, value_channels, BV):
        columns = start + tl.arange(0, BV)
        left = load_tile(left_ptr, rows, columns, stride_n, stride_c, tokens, value_channels)  # [BN, BV]
        context = load_tile(context_ptr, columns, features, 1, value_channels, value_channels, key_channels)
        total += dot(left, context, tl.float32, PRECISION)
    return total


@triton.jit
def attention_output_kernel(
    query_ptr,  # [B, heads, N, D], strided
    context_ptr,  # [B * heads, D, V]
    length_ptr,  # [B]
    output_ptr,  # [B, heads, N, V], strided
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
    output_stride_b,
    output_stride_h,
    output_stride_n,
    output_stride_c,
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
    output_stride_b = aligned(output_stride_b, ALIGN)
    output_stride_h = aligned(output_stride_h, ALIGN)
    output_stride_n = aligned(output_stride_n, ALIGN)
    token_tiles = tl.cdiv(tokens, BN)
    pair = (tl.program_id(0) // token_tiles).to(tl.int64)
    rows = tl.program_id(0) % token_tiles * BN + tl.arange(0, BN)
    columns = tl.program_id(1) * BV + tl.arange(0, BV)
    batch = pair // heads
    if BY_LENGTH:
        query_scale = query_scale / tl.sqrt(tl.maximum(tl.load(length_ptr + batch), 1).to(tl.float32))
    query_ptr += batch * query_stride_b + pair % heads * query_stride_h
    context_ptr += pair * key_channels * value_channels
    shift, factor = query_statistics(query_ptr, rows, query_stride_n, query_stride_c, tokens, key_channels, query_scale,
                                     SOFTMAX, BN, BD)  # fmt: skip
    output = tl.zeros([BN, BV], tl.float32)
    for start in range(0, key_channels, BD):
        features = start + tl.arange(0, BD)
        weights = query_weights(query_ptr, rows, features, query_stride_n, query_stride_c, tokens, key_channels,
                                query_scale, shift, factor, SOFTMAX)  # fmt: skip
        context = load_tile(context_ptr, features, columns, value_channels, 1, key_channels, value_channels)
        output += dot(weights, context, tl.float32, PRECISION)
    output_ptr += batch * output_stride_b + pair % heads * output_stride_h
    output *= output_scale
    store_tile(output_ptr, output, rows, columns, output_stride_n, output_stride_c, tokens, value_channels)
