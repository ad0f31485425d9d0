"""Tiles of tokens and matrices in Triton: loading, storing, rounding, products, LayerNorm of rows.

What the kernels of all operators share; those live in the folder of their operator (`triton_kernels.py`).
Conventions, as in their shape comments: N tokens, C channels, D key features, V value features, H hidden features;
BN, BC, ... are the sizes of a tile, powers of two, whose padding is masked. Tensors come with their strides and are
never copied to be contiguous; offsets that are multiplied by a stride are 64-bit. Statistics and accumulators are
float32.

Numbers of channels are compile-time constants and strides are known to be multiples of ALIGN, so that whole vectors are
loaded: at C = 100, without either, every element was loaded by itself and the kernels spilled registers.

Under ``TRITON_INTERPRET=1`` (set before the first import) the kernels run on CPU tensors, in NumPy. Its interpreter
truncates to bfloat16 and multiplies bfloat16 as integers, so `narrow` and `dot` do both by hand there.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x in `dtype`, rounded to nearest."""
    if x.dtype == dtype:
        return x
    elif INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x == x, rounded, 0x7FC0)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def round_to_tf32(x):
    """float32 rounded to the nearest of tf32's values; infinity and NaN stay what they are."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)


@triton.jit
def round_to_tf32_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """Of a weight that every tile of tokens is multiplied with: rounded there, it would pass the registers, and stay in
    them."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, round_to_tf32(tl.load(x_ptr + at, mask=at < size, other=0.0)), mask=at < size)


@triton.jit
def operand(x, dtype: tl.constexpr, precision: tl.constexpr):
    """x as a product takes it. Tensor cores cut a float32 operand to tf32, so it is rounded before."""
    x = narrow(x, dtype)
    if dtype == tl.float32 and precision == "tf32":
        x = round_to_tf32(x)
    return x


@triton.jit
def dot(a, b, dtype: tl.constexpr, precision: tl.constexpr, ROUNDED: tl.constexpr = False):
    """a @ b of operands as `operand` makes them, summed in float32. `ROUNDED`: b is one already, in memory, from which
    it can go to the product without passing registers."""
    a = operand(a, dtype, precision)
    if not ROUNDED:
        b = operand(b, dtype, precision)
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=precision)


@triton.jit
def aligned(stride, ALIGN: tl.constexpr):
    """The stride, which ALIGN divides, so that the compiler knows it and loads whole vectors."""
    return stride // ALIGN * ALIGN


@triton.jit
def load_operand(pointer, rows, columns, row_stride, column_stride, row_count, column_count):
    """Rows and columns of a matrix as they are, zeros outside: an operand can go to a product without passing
    registers, unless it is to be rounded (see `round_to_tf32_kernel`)."""
    offsets = rows[:, None] * row_stride + columns[None, :] * column_stride
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    return tl.load(pointer + offsets, mask=inside, other=0.0)


@triton.jit
def load_tile(pointer, rows, columns, row_stride, column_stride, row_count, column_count):
    """Rows and columns of a matrix as float32, zeros outside."""
    offsets = rows[:, None].to(tl.int64) * row_stride + columns[None, :].to(tl.int64) * column_stride
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    return tl.load(pointer + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_tile(pointer, value, rows, columns, row_stride, column_stride, row_count, column_count):
    """Rounded to the pointer's dtype."""
    offsets = rows[:, None].to(tl.int64) * row_stride + columns[None, :].to(tl.int64) * column_stride
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    tl.store(pointer + offsets, narrow(value, pointer.dtype.element_ty), mask=inside)


@triton.jit
def load_vector(pointer, index, count, PRESENT: tl.constexpr, missing: tl.constexpr):
    """A parameter as float32, zeros outside; `missing` everywhere where it is absent."""
    if PRESENT:
        return tl.load(pointer + index, mask=index < count, other=0.0).to(tl.float32)
    else:
        return tl.where(index < count, missing, 0.0).to(tl.float32)


@triton.jit
def reciprocal_deviation(variance, eps):
    """NaN where the variance is beyond the largest number, as nothing right is left to say."""
    return 1.0 / tl.sqrt(variance + eps) + (variance - variance)


@triton.jit
def normalize_rows(x, columns, count, eps):
    """Rows with mean 0 and variance 1, zeros in the padding, and 1 / sqrt(variance + eps) of each."""
    mean = tl.sum(x, 1) / count
    centred = tl.where((columns < count)[None, :], x - mean[:, None], 0.0)
    rstd = reciprocal_deviation(tl.sum(centred * centred, 1) / count, eps)
    return centred * rstd[:, None], rstd


@triton.jit
def normalize_rows_backward(grad, normalized, rstd, weight, count):
    """Gradient of the rows from that of ``normalized * weight + bias``."""
    scaled = grad * weight[None, :]
    mean = tl.sum(scaled, 1) / count
    mean_dot = tl.sum(scaled * normalized, 1) / count
    return (scaled - mean[:, None] - normalized * mean_dot[:, None]) * rstd[:, None]


@triton.jit
def softmax_rows_backward(weights, grad):
    """Gradient of the logits of a softmax over each row. The mean is taken out twice: the second time mends the
    rounding of
    the first, which matters where one weight is near 1 and the difference small."""
    centred = grad - tl.sum(weights * grad, 1)[:, None]
    return weights * (centred - tl.sum(weights * centred, 1)[:, None])


@triton.jit
def layer_norm_backward_kernel(
    grad_ptr,  # [B, N, C], of the norm's output
    x_ptr,  # [B, N, C], strided
    residual_ptr,  # [B, N, C], strided: added to the gradient of x
    weight_ptr,  # [C]
    grad_x_ptr,  # [B, N, C]
    partial_ptr,  # [B * splits, 2, C]: gradients of weight and bias
    tokens,
    channels: tl.constexpr,
    split_size,
    eps,
    x_stride_b,
    x_stride_n,
    x_stride_c,
    residual_stride_b,
    residual_stride_n,
    residual_stride_c,
    RESIDUAL: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    ALIGN: tl.constexpr,
):
    x_stride_b = aligned(x_stride_b, ALIGN)
    x_stride_n = aligned(x_stride_n, ALIGN)
    residual_stride_b = aligned(residual_stride_b, ALIGN)
    residual_stride_n = aligned(residual_stride_n, ALIGN)
    batch = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    columns = tl.arange(0, BC)
    weight = load_vector(weight_ptr, columns, channels, True, 0.0)
    grad_weight = tl.zeros([BC], tl.float32)
    grad_bias = tl.zeros([BC], tl.float32)
    first = split * split_size
    for start in range(first, tl.minimum(first + split_size, tokens), BN):
        rows = start + tl.arange(0, BN)
        x = load_tile(x_ptr + batch * x_stride_b, rows, columns, x_stride_n, x_stride_c, tokens, channels)  # [BN, BC]
        grad = load_tile(grad_ptr + batch * tokens * channels, rows, columns, channels, 1, tokens, channels)
        normalized, rstd = normalize_rows(x, columns, channels, eps)
        grad_weight += tl.sum(grad * normalized, 0)
        grad_bias += tl.sum(grad, 0)
        grad_x = normalize_rows_backward(grad, normalized, rstd, weight, channels)
        if RESIDUAL:
            residual = residual_ptr + batch * residual_stride_b
            grad_x += load_tile(residual, rows, columns, residual_stride_n, residual_stride_c, tokens, channels)
        store_tile(grad_x_ptr + batch * tokens * channels, grad_x, rows, columns, channels, 1, tokens, channels)
    partial = partial_ptr + (batch * tl.num_programs(1) + split) * 2 * channels
    tl.store(partial + columns, grad_weight, mask=columns < channels)
    tl.store(partial + channels + columns, grad_bias, mask=columns < channels)
