"""Efficient attention on query, key, value in Triton: any number of tokens and features, any strides, masks.

    context = rho_k(key)^T value,   output = output_scale * rho_q(query) context

Forward: `context_kernel` makes partial sums over a split of the tokens for a tile of the context, with a running maximum and
sum a key feature (online softmax, as FlashAttention over keys); `combine_kernel` adds the splits; `output_kernel` reads the
queries once. Bytes moved: query, key, value and output once each (key and value once for every tile of 64 features of the
other). Backward: `query_gradient_kernel` (grad of query, and two statistics a query), `context_gradient_kernel` and a
combine (reduction over queries), `key_gradient_kernel` (grads of key and value). Everything in between stays in registers.

Products are of float32 operands (see `dot_precision`), since the context and its gradient are float32 whatever comes in.
Without softmax ("scaling") the running maximum is 0 and the sum is the square root of the number of tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from msformer_kernels.triton_common import dot, load_tile, softmax_rows_backward, store_tile


@triton.jit
def context_kernel(
    key_ptr,  # [B, heads, N, D], strided
    value_ptr,  # [B, heads, N, V], strided
    mask_ptr,  # [B, N] bytes
    max_ptr,  # [B * heads, splits, D]
    sum_ptr,
    partial_ptr,  # [B * heads, splits, D, V]
    heads,
    tokens,
    key_channels,
    value_channels,
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
):
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
        key = load_tile(key_ptr, rows, features, key_stride_n, key_stride_c, tokens, key_channels) * key_scale  # [BN, BD]
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
def combine_kernel(
    max_ptr,  # [groups, splits, D]
    sum_ptr,
    partial_ptr,  # [groups, splits, D, V]
    length_ptr,  # [B]: tokens that are kept
    out_ptr,  # [groups, D, V]
    out_max_ptr,  # [groups, D]
    out_sum_ptr,
    heads,
    splits,
    key_channels,
    value_channels,
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
    tl.store(out_ptr + (group * key_channels + feature) * value_channels + columns, result, mask=columns < value_channels)
    tl.store(out_max_ptr + group * key_channels + feature, largest)
    tl.store(out_sum_ptr + group * key_channels + feature, total)


@triton.jit
def normalized_query(query, columns, key_channels, scale, SOFTMAX: tl.constexpr):
    """rho_q of rows [BN, BD] that hold all features; also the shift and the factor that give it from the logits."""
    if SOFTMAX:
        logits = tl.where((columns < key_channels)[None, :], query * scale, float("-inf"))
        shift = tl.max(logits, 1)
        weight = tl.exp(logits - shift[:, None])
        factor = 1.0 / tl.sum(weight, 1)
        return weight * factor[:, None], shift, factor
    else:
        return query * scale, tl.zeros_like(tl.sum(query, 1)), tl.sum(tl.zeros_like(query), 1) + scale


@triton.jit
def output_kernel(
    query_ptr,  # [B, heads, N, D], strided
    context_ptr,  # [B * heads, D, V]
    length_ptr,  # [B]
    output_ptr,  # [B, heads, N, V], strided
    heads,
    tokens,
    key_channels,
    value_channels,
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
):
    token_tiles = tl.cdiv(tokens, BN)
    pair = (tl.program_id(0) // token_tiles).to(tl.int64)
    rows = tl.program_id(0) % token_tiles * BN + tl.arange(0, BN)
    batch = pair // heads
    features = tl.arange(0, BD)
    if BY_LENGTH:
        query_scale = query_scale / tl.sqrt(tl.maximum(tl.load(length_ptr + batch), 1).to(tl.float32))
    query_ptr += batch * query_stride_b + pair % heads * query_stride_h
    query = load_tile(query_ptr, rows, features, query_stride_n, query_stride_c, tokens, key_channels)
    weight, _, _ = normalized_query(query, features, key_channels, query_scale, SOFTMAX)  # [BN, BD]
    for start in range(0, value_channels, BV):
        columns = start + tl.arange(0, BV)
        context = load_tile(
            context_ptr + pair * key_channels * value_channels,
            features,
            columns,
            value_channels,
            1,
            key_channels,
            value_channels,
        )  # [BD, BV]
        output = dot(weight, context, tl.float32, PRECISION) * output_scale
        at = output_ptr + batch * output_stride_b + pair % heads * output_stride_h
        store_tile(at, output, rows, columns, output_stride_n, output_stride_c, tokens, value_channels)


@triton.jit
def query_gradient_kernel(
    query_ptr,  # [B, heads, N, D], strided
    grad_output_ptr,  # [B, heads, N, V], strided
    context_ptr,  # [B * heads, D, V]
    length_ptr,  # [B]
    grad_query_ptr,  # [B, heads, N, D], strided
    shift_ptr,  # [B * heads, N]: the weights of a query are exp(logit - shift) * factor
    factor_ptr,
    heads,
    tokens,
    key_channels,
    value_channels,
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
):
    token_tiles = tl.cdiv(tokens, BN)
    pair = (tl.program_id(0) // token_tiles).to(tl.int64)
    rows = tl.program_id(0) % token_tiles * BN + tl.arange(0, BN)
    batch = pair // heads
    features = tl.arange(0, BD)
    if BY_LENGTH:
        query_scale = query_scale / tl.sqrt(tl.maximum(tl.load(length_ptr + batch), 1).to(tl.float32))
    query_ptr += batch * query_stride_b + pair % heads * query_stride_h
    grad_output_ptr += batch * grad_stride_b + pair % heads * grad_stride_h
    query = load_tile(query_ptr, rows, features, query_stride_n, query_stride_c, tokens, key_channels)
    weight, shift, factor = normalized_query(query, features, key_channels, query_scale, SOFTMAX)
    grad_weight = tl.zeros([BN, BD], tl.float32)
    for start in range(0, value_channels, BV):
        columns = start + tl.arange(0, BV)
        grad = load_tile(grad_output_ptr, rows, columns, grad_stride_n, grad_stride_c, tokens, value_channels)  # [BN, BV]
        context = load_tile(
            context_ptr + pair * key_channels * value_channels,
            columns,
            features,
            1,
            value_channels,
            value_channels,
            key_channels,
        )  # [BV, BD]
        grad_weight += dot(grad, context, tl.float32, PRECISION)
    grad_weight *= output_scale
    if SOFTMAX:
        grad_query = softmax_rows_backward(weight, grad_weight)
    else:
        grad_query = grad_weight
    at = grad_query_ptr + batch * grad_query_stride_b + pair % heads * grad_query_stride_h
    grad_query *= query_scale
    store_tile(at, grad_query, rows, features, grad_query_stride_n, grad_query_stride_c, tokens, key_channels)
    tl.store(shift_ptr + pair * tokens + rows, shift, mask=rows < tokens)
    tl.store(factor_ptr + pair * tokens + rows, factor, mask=rows < tokens)


@triton.jit
def context_gradient_kernel(
    query_ptr,  # [B, heads, N, D], strided
    grad_output_ptr,  # [B, heads, N, V], strided
    shift_ptr,  # [B * heads, N]
    factor_ptr,
    partial_ptr,  # [B * heads, splits, D, V]
    heads,
    tokens,
    key_channels,
    value_channels,
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
):
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
def combine_gradient_kernel(
    partial_ptr,  # [groups, splits, D, V]
    added_ptr,  # [groups, D, V]
    context_ptr,  # [groups, D, V]
    out_ptr,  # [groups, D, V]
    delta_ptr,  # [groups, D]: <context, out> of each key feature
    splits,
    key_channels,
    value_channels,
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
def key_gradient_kernel(
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
    key_channels,
    value_channels,
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
    BN: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    token_tiles = tl.cdiv(tokens, BN)
    pair = (tl.program_id(0) // token_tiles).to(tl.int64)
    rows = tl.program_id(0) % token_tiles * BN + tl.arange(0, BN)
    batch = pair // heads
    features = tl.arange(0, BD)
    key_ptr += batch * key_stride_b + pair % heads * key_stride_h
    value_ptr += batch * value_stride_b + pair % heads * value_stride_h
    kept = rows < tokens
    if MASKED:
        bytes = tl.load(mask_ptr + batch * mask_stride_b + rows.to(tl.int64) * mask_stride_n, mask=kept, other=0)
        kept = kept & (bytes != 0)
    key = load_tile(key_ptr, rows, features, key_stride_n, key_stride_c, tokens, key_channels) * key_scale  # [BN, BD]
    total = tl.load(sum_ptr + pair * key_channels + features, mask=features < key_channels, other=1.0)
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    if SOFTMAX:
        largest = tl.load(max_ptr + pair * key_channels + features, mask=features < key_channels, other=0.0)
        key = tl.exp(key - tl.where(largest == float("-inf"), 0.0, largest)[None, :])
    key = tl.where(kept[:, None], key * inverse[None, :], 0.0)
    grad_weight = tl.zeros([BN, BD], tl.float32)
    for start in range(0, value_channels, BV):
        columns = start + tl.arange(0, BV)
        value = load_tile(value_ptr, rows, columns, value_stride_n, value_stride_c, tokens, value_channels)  # [BN, BV]
        value = tl.where(kept[:, None], value, 0.0)
        gradient = grad_context_ptr + pair * key_channels * value_channels
        grad_context = load_tile(gradient, features, columns, value_channels, 1, key_channels, value_channels)  # [BD, BV]
        grad_weight += dot(value, tl.trans(grad_context), tl.float32, PRECISION)
        grad_value = dot(key, grad_context, tl.float32, PRECISION)
        at = grad_value_ptr + batch * grad_value_stride_b + pair % heads * grad_value_stride_h
        store_tile(at, grad_value, rows, columns, grad_value_stride_n, grad_value_stride_c, tokens, value_channels)
    if SOFTMAX:
        delta = tl.load(delta_ptr + pair * key_channels + features, mask=features < key_channels, other=0.0)
        # a token that has all the weight has its own gradient as delta, up to rounding: exactly no gradient
        grad_key = tl.where(key == 1.0, 0.0, key * (grad_weight - delta[None, :]))
    else:
        grad_key = tl.where(kept[:, None], grad_weight * inverse[None, :], 0.0)
    at = grad_key_ptr + batch * grad_key_stride_b + pair % heads * grad_key_stride_h
    store_tile(at, grad_key * key_scale, rows, features, grad_key_stride_n, grad_key_stride_c, tokens, key_channels)
