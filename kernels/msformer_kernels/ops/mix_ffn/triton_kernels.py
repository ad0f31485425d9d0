"""MixFFN's convolution, norm and activation in Triton, between matrix products of the vendor's library.

    U = [LN](x) W_1 + b_1,   Z = dw3x3(U) + b_d [+ U],   T = act([LN](Z)),   Y = T W_2 + b_2 [+ x]

`mix_ffn_activation_kernel` makes T from U in one pass: a program owns some columns of the image and walks down its
rows; each row of U is read once (three times from the first-level cache, for the columns left and right of it) while
the row before it is worked on, and added to the three rows of Z it belongs to, which stay in registers, as the taps do.
Without a hidden norm, features are cut into tiles too; with one, a program holds all of them, so that the norm needs no
second pass. N x H values are read and as many written.

Backward: U is made again; `mix_ffn_activation_backward_kernel` walks as the forward does and turns dT into dZ, writing
T as well (for the gradient of W_2) and reducing the gradients of the hidden norm; `mix_ffn_convolution_backward_kernel`
walks over dZ and U, writes dU and reduces the gradients of the taps and of both biases.
"""

from __future__ import annotations

import triton
import triton.language as tl

from msformer_kernels.triton.tiles import load_vector, narrow, normalize_rows, normalize_rows_backward


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation and its derivative."""
    if ACTIVATION == "relu":  # NaN stays NaN
        return tl.where(x < 0, 0.0, x), tl.where(x <= 0, 0.0, 1.0)
    elif ACTIVATION == "gelu_tanh":
        # x sigmoid(2y), y = sqrt(2 / pi) (x + 0.044715 x^3): the same as x (1 + tanh y) / 2
        y = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        e = tl.exp(-2.0 * tl.abs(y))
        sigmoid = tl.where(y < 0, e / (1.0 + e), 1.0 / (1.0 + e))
        slope = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * x * x)
        return x * sigmoid, sigmoid + 2.0 * e / ((1.0 + e) * (1.0 + e)) * x * slope
    elif ACTIVATION == "identity":
        return x, tl.full(x.shape, 1.0, tl.float32)
    elif ACTIVATION == "silu":
        e = tl.exp(-tl.abs(x))
        small = e / (1.0 + e)
        large = 1.0 / (1.0 + e)
        sigmoid = tl.where(x < 0, small, large)
        return x * sigmoid, sigmoid + x * small * large
    elif ACTIVATION == "hardswish":
        value = tl.where(x <= -3, x * 0.0, tl.where(x >= 3, x, x * (x + 3.0) / 6.0))
        return value, tl.where(x <= -3, 0.0, tl.where(x >= 3, 1.0, x / 3.0 + 0.5))
    elif ACTIVATION == "relu6":
        return tl.where(x < 0, 0.0, tl.where(x > 6, 6.0, x)), tl.where((x <= 0) | (x >= 6), 0.0, 1.0)
    else:
        cdf = normal_cdf(x)
        return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def normal_cdf(x):
    """(1 + erf(x / sqrt 2)) / 2, with a small relative error in the lower tail too, where 1 + erf cancels.

    The tail is exp(-x^2 / 2) t P(t), t = 1 / (1 + 0.21 |x|), P a minimax fit of degree 8 for |x| <= 13.5.
    """
    t = 1.0 / (tl.abs(x) * 0.21 + 1.0)
    p = t * -0.0720338448882103 + 0.2854527533054352
    p = p * t - 0.3341883718967438
    p = p * t + 0.3540322184562683
    p = p * t - 0.0972447395324707
    p = p * t + 0.12635473906993866
    p = p * t + 0.06879014521837234
    p = p * t + 0.08512939512729645
    p = p * t + 0.08370770514011383
    tail = p * t * tl.exp(-0.5 * x * x)
    return tl.where(x < 0, tail, 1.0 - tail)


@triton.jit
def load_row(pointer, row, column, features, height, width, hidden):
    """Of `[H, W, hidden]`: one image row at some columns, as it is, zeros outside the image."""
    line = tl.zeros_like(column) + row  # a tensor whether row is one or, in the interpreter, an int
    inside = (column >= 0) & (column < width) & (line >= 0) & (line < height)
    offsets = (column + line * width).to(tl.int64)[:, None] * hidden + features[None, :]
    return tl.load(pointer + offsets, mask=inside[:, None] & (features < hidden)[None, :], other=0.0)


@triton.jit
def load_three(pointer, row, column, features, height, width, hidden):
    """One image row at some columns, and at those left and right of them."""
    left = load_row(pointer, row, column - 1, features, height, width, hidden)
    middle = load_row(pointer, row, column, features, height, width, hidden)
    return left, middle, load_row(pointer, row, column + 1, features, height, width, hidden)


@triton.jit
def store_row(pointer, value, row, column, features, width, hidden):
    offsets = (column + row * width).to(tl.int64)[:, None] * hidden + features[None, :]
    inside = (column < width)[:, None] & (features < hidden)[None, :]
    tl.store(pointer + offsets, narrow(value, pointer.dtype.element_ty), mask=inside)


@triton.jit
def load_tap(taps_ptr, features, hidden, TAP: tl.constexpr, SKIP: tl.constexpr):
    """One of the nine weights of every feature, of `[9, hidden]`; the skip connection is part of the centre one."""
    tap = tl.load(taps_ptr + TAP * hidden + features, mask=features < hidden, other=0.0).to(tl.float32)
    if SKIP and TAP == 4:
        tap += 1.0
    return tap[None, :]


@triton.jit
def load_taps(taps_ptr, features, hidden, SKIP: tl.constexpr):
    return (
        load_tap(taps_ptr, features, hidden, 0, SKIP),
        load_tap(taps_ptr, features, hidden, 1, SKIP),
        load_tap(taps_ptr, features, hidden, 2, SKIP),
        load_tap(taps_ptr, features, hidden, 3, SKIP),
        load_tap(taps_ptr, features, hidden, 4, SKIP),
        load_tap(taps_ptr, features, hidden, 5, SKIP),
        load_tap(taps_ptr, features, hidden, 6, SKIP),
        load_tap(taps_ptr, features, hidden, 7, SKIP),
        load_tap(taps_ptr, features, hidden, 8, SKIP),
    )


@triton.jit
def add_row(total, left, middle, right, tap_left, tap_middle, tap_right):
    """total + the three columns of one row of the image times three neighbouring taps."""
    row = left.to(tl.float32) * tap_left
    row += middle.to(tl.float32) * tap_middle
    row += right.to(tl.float32) * tap_right
    return total + row


@triton.jit
def place(bands, band_rows, column_tiles, height, BW: tl.constexpr, BH: tl.constexpr):
    """Of this program: image, first row, row after the last, columns, hidden features."""
    strip = tl.program_id(0) // column_tiles
    first = strip % bands * band_rows
    columns = tl.program_id(0) % column_tiles * BW + tl.arange(0, BW)
    features = tl.program_id(1) * BH + tl.arange(0, BH)
    return (strip // bands).to(tl.int64), first, tl.minimum(first + band_rows, height), columns, features


@triton.jit
def mix_ffn_activation_kernel(
    hidden_ptr,  # U [B, H, W, hidden]
    taps_ptr,  # [9, hidden]
    bias_ptr,  # [hidden]
    norm_weight_ptr,  # [hidden]
    norm_bias_ptr,
    output_ptr,  # T [B, H, W, hidden]
    height,
    width,
    hidden: tl.constexpr,
    bands,
    band_rows,
    column_tiles,
    eps,
    SKIP: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    NORM_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BW: tl.constexpr,
    BH: tl.constexpr,
):
    batch, first, last, columns, features = place(bands, band_rows, column_tiles, height, BW, BH)
    hidden_ptr += batch * height * width * hidden
    output_ptr += batch * height * width * hidden
    tap0, tap1, tap2, tap3, tap4, tap5, tap6, tap7, tap8 = load_taps(taps_ptr, features, hidden, SKIP)
    bias = load_vector(bias_ptr, features, hidden, BIAS, 0.0)
    start = tl.zeros([BW, BH], tl.float32) + bias[None, :]
    above = start  # Z of the row before last so far, and of the last one
    at = start
    next_left, next_middle, next_right = load_three(hidden_ptr, first - 1, columns, features, height, width, hidden)
    for row in range(first - 1, last + 1):  # the next row is on its way while one is worked on
        left, middle, right = next_left, next_middle, next_right
        next_left, next_middle, next_right = load_three(hidden_ptr, row + 1, columns, features, height, width, hidden)
        z = add_row(above, left, middle, right, tap6, tap7, tap8)
        above = add_row(at, left, middle, right, tap3, tap4, tap5)
        at = add_row(start, left, middle, right, tap0, tap1, tap2)
        if row > first:
            if NORM:
                z, _ = normalize_rows(z, features, hidden, eps)
                weight = load_vector(norm_weight_ptr, features, hidden, True, 0.0)
                z = z * weight[None, :] + load_vector(norm_bias_ptr, features, hidden, NORM_BIAS, 0.0)[None, :]
            value, _ = activate(z, ACTIVATION)
            store_row(output_ptr, value, row - 1, columns, features, width, hidden)


@triton.jit
def mix_ffn_activation_backward_kernel(
    hidden_ptr,  # U [B, H, W, hidden]
    grad_ptr,  # dT [B, H, W, hidden]
    taps_ptr,  # [9, hidden]
    bias_ptr,  # [hidden]
    norm_weight_ptr,  # [hidden]
    norm_bias_ptr,
    output_ptr,  # T [B, H, W, hidden]
    grad_z_ptr,  # dZ [B, H, W, hidden]
    partial_ptr,  # [programs of axis 0, 2, hidden]: gradients of the norm's weight and bias
    height,
    width,
    hidden: tl.constexpr,
    bands,
    band_rows,
    column_tiles,
    eps,
    SKIP: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    NORM_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BW: tl.constexpr,
    BH: tl.constexpr,
):
    batch, first, last, columns, features = place(bands, band_rows, column_tiles, height, BW, BH)
    image = batch * height * width * hidden
    hidden_ptr += image
    tap0, tap1, tap2, tap3, tap4, tap5, tap6, tap7, tap8 = load_taps(taps_ptr, features, hidden, SKIP)
    bias = load_vector(bias_ptr, features, hidden, BIAS, 0.0)
    start = tl.zeros([BW, BH], tl.float32) + bias[None, :]
    above = start
    at = start
    grad_weight = tl.zeros([BH], tl.float32)
    grad_bias = tl.zeros([BH], tl.float32)
    next_grad = load_row(grad_ptr + image, first - 2, columns, features, height, width, hidden)
    next_left, next_middle, next_right = load_three(hidden_ptr, first - 1, columns, features, height, width, hidden)
    for row in range(first - 1, last + 1):  # the next row is on its way while one is worked on
        left, middle, right = next_left, next_middle, next_right
        next_left, next_middle, next_right = load_three(hidden_ptr, row + 1, columns, features, height, width, hidden)
        z = add_row(above, left, middle, right, tap6, tap7, tap8)
        above = add_row(at, left, middle, right, tap3, tap4, tap5)
        at = add_row(start, left, middle, right, tap0, tap1, tap2)
        grad = next_grad.to(tl.float32)
        next_grad = load_row(grad_ptr + image, row, columns, features, height, width, hidden)
        if row > first:
            if NORM:
                normalized, rstd = normalize_rows(z, features, hidden, eps)
                weight = load_vector(norm_weight_ptr, features, hidden, True, 0.0)
                z = normalized * weight[None, :]
                z += load_vector(norm_bias_ptr, features, hidden, NORM_BIAS, 0.0)[None, :]
                value, slope = activate(z, ACTIVATION)
                grad *= slope
                grad_weight += tl.sum(grad * normalized, 0)
                grad_bias += tl.sum(grad, 0)
                grad = normalize_rows_backward(grad, normalized, rstd, weight, hidden)
            else:
                value, slope = activate(z, ACTIVATION)
                grad *= slope
            store_row(output_ptr + image, value, row - 1, columns, features, width, hidden)
            store_row(grad_z_ptr + image, grad, row - 1, columns, features, width, hidden)
    if NORM:
        partial = partial_ptr + tl.program_id(0).to(tl.int64) * 2 * hidden
        tl.store(partial + features, grad_weight, mask=features < hidden)
        tl.store(partial + hidden + features, grad_bias, mask=features < hidden)


@triton.jit
def mix_ffn_convolution_backward_kernel(
    grad_z_ptr,  # dZ [B, H, W, hidden]
    hidden_ptr,  # U [B, H, W, hidden]
    taps_ptr,  # [9, hidden]
    grad_hidden_ptr,  # dU [B, H, W, hidden]
    partial_ptr,  # [programs of axis 0, 11, hidden]: gradients of the taps, of b_d and of b_1
    height,
    width,
    hidden: tl.constexpr,
    bands,
    band_rows,
    column_tiles,
    SKIP: tl.constexpr,
    BW: tl.constexpr,
    BH: tl.constexpr,
):
    """dU = transposed convolution of dZ; tap (i, j) gets the sum over tokens of dZ at (r, c) times U at (r + i, c +
    j)."""
    batch, first, last, columns, features = place(bands, band_rows, column_tiles, height, BW, BH)
    image = batch * height * width * hidden
    hidden_ptr += image
    grad_z_ptr += image
    tap0, tap1, tap2, tap3, tap4, tap5, tap6, tap7, tap8 = load_taps(taps_ptr, features, hidden, SKIP)
    zeros = tl.zeros([BW, BH], tl.float32)
    above = zeros  # dU of the row before last so far, and of the last one
    at = zeros
    grad_tap0 = zeros
    grad_tap1 = zeros
    grad_tap2 = zeros
    grad_tap3 = zeros
    grad_tap4 = zeros
    grad_tap5 = zeros
    grad_tap6 = zeros
    grad_tap7 = zeros
    grad_tap8 = zeros
    grad_bias = zeros
    grad_hidden_bias = zeros
    next_left, next_middle, next_right = load_three(grad_z_ptr, first - 1, columns, features, height, width, hidden)
    # U of the row before, of this one and of the next
    before = load_row(hidden_ptr, -1, columns, features, height, width, hidden)
    own = before
    after = load_row(hidden_ptr, first, columns, features, height, width, hidden)
    for row in range(first - 1, last + 1):  # the next row is on its way while one is worked on
        left, middle, right = next_left, next_middle, next_right
        next_left, next_middle, next_right = load_three(grad_z_ptr, row + 1, columns, features, height, width, hidden)
        # U of the band's own rows only: every token of U belongs to one program
        row_of_next = tl.where(row + 2 < last, row + 2, -1)
        next_after = load_row(hidden_ptr, row_of_next, columns, features, height, width, hidden)
        grad_hidden = add_row(above, left, middle, right, tap2, tap1, tap0)
        above = add_row(at, left, middle, right, tap5, tap4, tap3)
        at = add_row(zeros, left, middle, right, tap8, tap7, tap6)
        if row > first:
            store_row(grad_hidden_ptr + image, grad_hidden, row - 1, columns, features, width, hidden)
            grad_hidden_bias += tl.where((columns < width)[:, None], grad_hidden, 0.0)
        left = left.to(tl.float32)
        middle = middle.to(tl.float32)
        right = right.to(tl.float32)
        if (row >= first) & (row < last):
            grad_bias += middle
        u = before.to(tl.float32)
        grad_tap0 += right * u
        grad_tap1 += middle * u
        grad_tap2 += left * u
        u = own.to(tl.float32)
        grad_tap3 += right * u
        grad_tap4 += middle * u
        grad_tap5 += left * u
        u = after.to(tl.float32)
        grad_tap6 += right * u
        grad_tap7 += middle * u
        grad_tap8 += left * u
        before, own, after = own, after, next_after
    partial = partial_ptr + tl.program_id(0).to(tl.int64) * 11 * hidden + features
    inside = features < hidden
    tl.store(partial, tl.sum(grad_tap0, 0), mask=inside)
    tl.store(partial + hidden, tl.sum(grad_tap1, 0), mask=inside)
    tl.store(partial + 2 * hidden, tl.sum(grad_tap2, 0), mask=inside)
    tl.store(partial + 3 * hidden, tl.sum(grad_tap3, 0), mask=inside)
    tl.store(partial + 4 * hidden, tl.sum(grad_tap4, 0), mask=inside)
    tl.store(partial + 5 * hidden, tl.sum(grad_tap5, 0), mask=inside)
    tl.store(partial + 6 * hidden, tl.sum(grad_tap6, 0), mask=inside)
    tl.store(partial + 7 * hidden, tl.sum(grad_tap7, 0), mask=inside)
    tl.store(partial + 8 * hidden, tl.sum(grad_tap8, 0), mask=inside)
    tl.store(partial + 9 * hidden, tl.sum(grad_bias, 0), mask=inside)
    tl.store(partial + 10 * hidden, tl.sum(grad_hidden_bias, 0), mask=inside)
