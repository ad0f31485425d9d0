"""BatchNorm of tokens in Triton: two passes forward, two backward, each reading the tokens once from device memory.

Forward: `batch_norm_statistics_kernel` makes mean and sum of squared deviations of every split of the tokens (its
second look at them finds them in the cache, and also tells by how much rounding put the mean off);
`batch_norm_combine_statistics_kernel` merges the splits (Chan, Golub, LeVeque, "Updating formulae and a pairwise
algorithm for computing sample variances", 1979), in float64, so that a large mean does not swallow the variance;
`batch_norm_normalize_kernel` writes the output. Backward: `batch_norm_gradient_sums_kernel`, then
`batch_norm_gradient_kernel`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from msformer_kernels.triton.tiles import aligned, load_tile, load_vector, reciprocal_deviation, store_tile


@triton.jit
def batch_norm_statistics_kernel(
    x_ptr,  # [B, N, C], strided
    partial_ptr,  # [B, splits, 4, C]: count, mean, its rounding error, sum of squared deviations
    tokens,
    channels: tl.constexpr,
    split_size,
    stride_b,
    stride_n,
    stride_c,
    BN: tl.constexpr,
    BC: tl.constexpr,
    ALIGN: tl.constexpr,
):
    stride_b = aligned(stride_b, ALIGN)
    stride_n = aligned(stride_n, ALIGN)
    batch = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    columns = tl.program_id(2) * BC + tl.arange(0, BC)
    x_ptr += batch * stride_b
    first = split * split_size
    last = tl.minimum(first + split_size, tokens)
    count = (last - first).to(tl.float32)
    total = tl.zeros([BN, BC], tl.float32)
    for start in range(first, last, BN):
        total += load_tile(x_ptr, start + tl.arange(0, BN), columns, stride_n, stride_c, last, channels)
    mean = tl.sum(total, 0) / count
    deviations = tl.zeros([BN, BC], tl.float32)
    squares = tl.zeros([BN, BC], tl.float32)
    for start in range(first, last, BN):
        rows = start + tl.arange(0, BN)
        x = load_tile(x_ptr, rows, columns, stride_n, stride_c, last, channels)
        deviation = tl.where((rows < last)[:, None], x - mean[None, :], 0.0)
        deviations += deviation
        squares += deviation * deviation
    partial = partial_ptr + (batch * tl.num_programs(1) + split) * 4 * channels + columns
    inside = columns < channels
    tl.store(partial, tl.zeros([BC], tl.float32) + count, mask=inside)
    tl.store(partial + channels, mean, mask=inside)
    tl.store(partial + 2 * channels, tl.sum(deviations, 0) / count, mask=inside)
    tl.store(partial + 3 * channels, tl.sum(squares, 0), mask=inside)


@triton.jit
def batch_norm_combine_statistics_kernel(
    partial_ptr,  # [parts, 4, C]
    mean_ptr,  # [C]
    variance_ptr,
    parts,
    channels: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
):
    columns = tl.program_id(0) * BC + tl.arange(0, BC)
    row = 4 * channels
    count = tl.zeros([BC], tl.float64)
    total = tl.zeros([BC], tl.float64)
    for start in range(0, parts, BS):
        rows = start + tl.arange(0, BS)
        counts = load_tile(partial_ptr, rows, columns, row, 1, parts, channels).to(tl.float64)  # [BS, BC]
        means = load_means(partial_ptr, rows, columns, parts, channels)
        count += tl.sum(counts, 0)
        total += tl.sum(counts * means, 0)
    count = tl.where(count == 0.0, 1.0, count)
    mean = total / count
    squares = tl.zeros([BC], tl.float64)
    for start in range(0, parts, BS):
        rows = start + tl.arange(0, BS)
        counts = load_tile(partial_ptr, rows, columns, row, 1, parts, channels).to(tl.float64)
        deviation = load_means(partial_ptr, rows, columns, parts, channels) - mean[None, :]
        own = load_tile(partial_ptr + 3 * channels, rows, columns, row, 1, parts, channels).to(tl.float64)
        squares += tl.sum(own + counts * deviation * deviation, 0)
    tl.store(mean_ptr + columns, mean.to(tl.float32), mask=columns < channels)
    tl.store(variance_ptr + columns, (squares / count).to(tl.float32), mask=columns < channels)


@triton.jit
def load_means(partial_ptr, rows, columns, parts, channels: tl.constexpr):
    """Means of some parts with what rounding left out of them, float64 [BS, BC]."""
    mean = load_tile(partial_ptr + channels, rows, columns, 4 * channels, 1, parts, channels)
    left_out = load_tile(partial_ptr + 2 * channels, rows, columns, 4 * channels, 1, parts, channels)
    return mean.to(tl.float64) + left_out.to(tl.float64)


@triton.jit
def batch_norm_normalize_kernel(
    x_ptr,  # [B, N, C], strided
    mean_ptr,  # [C]
    variance_ptr,
    weight_ptr,
    bias_ptr,
    output_ptr,  # [B, N, C]
    tokens,
    channels: tl.constexpr,
    eps,
    stride_b,
    stride_n,
    stride_c,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    ALIGN: tl.constexpr,
):
    stride_b = aligned(stride_b, ALIGN)
    stride_n = aligned(stride_n, ALIGN)
    token_tiles = tl.cdiv(tokens, BN)
    batch = (tl.program_id(0) // token_tiles).to(tl.int64)
    rows = tl.program_id(0) % token_tiles * BN + tl.arange(0, BN)
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    mean = load_vector(mean_ptr, columns, channels, True, 0.0)
    rstd = reciprocal_deviation(load_vector(variance_ptr, columns, channels, True, 0.0), eps)
    scale = load_vector(weight_ptr, columns, channels, WEIGHT, 1.0) * rstd
    bias = load_vector(bias_ptr, columns, channels, BIAS, 0.0)
    x = load_tile(x_ptr + batch * stride_b, rows, columns, stride_n, stride_c, tokens, channels)
    output = (x - mean[None, :]) * scale[None, :] + bias[None, :]
    store_tile(output_ptr + batch * tokens * channels, output, rows, columns, channels, 1, tokens, channels)


@triton.jit
def batch_norm_gradient_sums_kernel(
    grad_ptr,  # [B, N, C], strided
    x_ptr,  # [B, N, C], strided
    mean_ptr,  # [C]
    variance_ptr,
    partial_ptr,  # [B, splits, 2, C]: sums of grad and of grad times normalised x
    tokens,
    channels: tl.constexpr,
    split_size,
    eps,
    grad_stride_b,
    grad_stride_n,
    grad_stride_c,
    stride_b,
    stride_n,
    stride_c,
    BN: tl.constexpr,
    BC: tl.constexpr,
    ALIGN: tl.constexpr,
):
    grad_stride_b = aligned(grad_stride_b, ALIGN)
    grad_stride_n = aligned(grad_stride_n, ALIGN)
    stride_b = aligned(stride_b, ALIGN)
    stride_n = aligned(stride_n, ALIGN)
    batch = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    columns = tl.program_id(2) * BC + tl.arange(0, BC)
    mean = load_vector(mean_ptr, columns, channels, True, 0.0)
    rstd = reciprocal_deviation(load_vector(variance_ptr, columns, channels, True, 0.0), eps)
    total = tl.zeros([BN, BC], tl.float32)
    dot = tl.zeros([BN, BC], tl.float32)
    first = split * split_size
    last = tl.minimum(first + split_size, tokens)
    for start in range(first, last, BN):
        rows = start + tl.arange(0, BN)
        grad_rows = grad_ptr + batch * grad_stride_b
        grad = load_tile(grad_rows, rows, columns, grad_stride_n, grad_stride_c, last, channels)
        x = load_tile(x_ptr + batch * stride_b, rows, columns, stride_n, stride_c, last, channels)
        total += grad
        dot += tl.where((rows < last)[:, None], grad * (x - mean[None, :]), 0.0)
    partial = partial_ptr + (batch * tl.num_programs(1) + split) * 2 * channels + columns
    tl.store(partial, tl.sum(total, 0), mask=columns < channels)
    tl.store(partial + channels, tl.sum(dot, 0) * rstd, mask=columns < channels)


@triton.jit
def batch_norm_gradient_kernel(
    grad_ptr,  # [B, N, C], strided
    x_ptr,  # [B, N, C], strided
    mean_ptr,  # [C]
    variance_ptr,
    weight_ptr,
    sums_ptr,  # [2, C]
    grad_x_ptr,  # [B, N, C]
    tokens,
    channels: tl.constexpr,
    inverse_count,
    eps,
    grad_stride_b,
    grad_stride_n,
    grad_stride_c,
    stride_b,
    stride_n,
    stride_c,
    WEIGHT: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    ALIGN: tl.constexpr,
):
    grad_stride_b = aligned(grad_stride_b, ALIGN)
    grad_stride_n = aligned(grad_stride_n, ALIGN)
    stride_b = aligned(stride_b, ALIGN)
    stride_n = aligned(stride_n, ALIGN)
    token_tiles = tl.cdiv(tokens, BN)
    batch = (tl.program_id(0) // token_tiles).to(tl.int64)
    rows = tl.program_id(0) % token_tiles * BN + tl.arange(0, BN)
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    mean = load_vector(mean_ptr, columns, channels, True, 0.0)
    rstd = reciprocal_deviation(load_vector(variance_ptr, columns, channels, True, 0.0), eps)
    scale = load_vector(weight_ptr, columns, channels, WEIGHT, 1.0) * rstd
    grad_mean = load_vector(sums_ptr, columns, channels, True, 0.0) * inverse_count
    slope = load_vector(sums_ptr + channels, columns, channels, True, 0.0) * inverse_count * rstd
    grad_rows = grad_ptr + batch * grad_stride_b
    grad = load_tile(grad_rows, rows, columns, grad_stride_n, grad_stride_c, tokens, channels)
    x = load_tile(x_ptr + batch * stride_b, rows, columns, stride_n, stride_c, tokens, channels)
    grad_x = (grad - grad_mean[None, :] - (x - mean[None, :]) * slope[None, :]) * scale[None, :]
    store_tile(grad_x_ptr + batch * tokens * channels, grad_x, rows, columns, channels, 1, tokens, channels)
