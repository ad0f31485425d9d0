"""MixFFN's convolution, norm and activation in Triton, between matrix products of the vendor's library.

    U = [LN](x) W_1 + b_1,   Z = dw3x3(U) + b_d [+ U],   T = act([LN](Z)),   Y = T W_2 + b_2 [+ x]

`mix_ffn_activation_kernel` makes T from U in one pass: a program owns some columns of the image and walks down its
rows; each row of U is read once (three times from the first-level cache, for the columns left and right of it) and
added to the three rows of Z it belongs to, which stay in registers. Without a hidden norm, features are cut into tiles
too; with one, a program holds all of them, so that the norm needs no second pass. N x H values are read and as many
written.

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
        return x * sigmoid, sigmoid + 2.0 * x * slope * e / ((1.0 + e) * (1.0 + e))
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
    """Of `[H, W, hidden]`: one image row at some columns, zeros outside the image."""
    line = tl.zeros_like(column) + row  # a tensor whether row is one or, in the interpreter, an int
    inside = (column >= 0) & (column < width) & (line >= 0) & (line < height)
    offsets = (column + line * width).to(tl.int64)[:, None] * hidden + features[None, :]
    return tl.load(pointer + offsets, mask=inside[:, None] & (features < hidden)[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_row(pointer, value, row, column, features, width, hidden):
    offsets = (column + row * width).to(tl.int64)[:, None] * hidden + features[None, :]
    inside = (column < width)[:, None] & (features < hidden)[None, :]
    tl.store(pointer + offsets, narrow(value, pointer.dtype.element_ty), mask=inside)


@triton.jit
def load_tap(taps_ptr, features, hidden, TAP: tl.constexpr, SKIP: tl.constexpr):
    """One of the nine weights of every feature, of `[hidden, 9]`; the skip connection is part of the centre one."""
    tap = tl.load(taps_ptr + features * 9 + TAP, mask=features < hidden, other=0.0).to(tl.float32)
    if SKIP and TAP == 4:
        tap += 1.0
    return tap[None, :]


@triton.jit
def add_row(total, left, middle, right, taps_ptr, features, hidden, FIRST: tl.constexpr, STEP: tl.constexpr,
            SKIP: tl.constexpr):  # fmt: skip
    """total + the three columns of one row of the image times three neighbouring taps."""
    row = left * load_tap(taps_ptr, features, hidden, FIRST, SKIP)
    row += middle * load_tap(taps_ptr, features, hidden, FIRST + STEP, SKIP)
    row += right * load_tap(taps_ptr, features, hidden, FIRST + 2 * STEP, SKIP)
    return total + row


@triton.jit
def mix_ffn_activation_kernel(
    hidden_ptr,  # U [B, H, W, hidden]
    taps_ptr,  # [hidden, 9]
    bias_ptr,  # [hidden]
    norm_weight_ptr,  # [hidden]
    norm_bias_ptr,
    output_ptr,  # T [B, H, W, hidden]
    height,
    width,
    hidden: tl.constexpr,
    bands,
    band_rows,
    eps,
    SKIP: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    NORM_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BW: tl.constexpr,
    BH: tl.constexpr,
):
    batch = (tl.program_id(0) // bands).to(tl.int64)
    first = tl.program_id(0) % bands * band_rows
    last = tl.minimum(first + band_rows, height)
    columns = tl.program_id(1) * BW + tl.arange(0, BW)
    features = tl.program_id(2) * BH + tl.arange(0, BH)
    hidden_ptr += batch * height * width * hidden
    output_ptr += batch * height * width * hidden
    bias = load_vector(bias_ptr, features, hidden, BIAS, 0.0)
    start = tl.zeros([BW, BH], tl.float32) + bias[None, :]
    above = start  # Z of the row before last so far, and of the last one
    at = start
    for row in range(first - 1, last + 1):
        left = load_row(hidden_ptr, row, columns - 1, features, height, width, hidden)  # [BW, BH]
        middle = load_row(hidden_ptr, row, columns, features, height, width, hidden)
        right = load_row(hidden_ptr, row, columns + 1, features, height, width, hidden)
        z = add_row(above, left, middle, right, taps_ptr, features, hidden, 6, 1, SKIP)
        above = add_row(at, left, middle, right, taps_ptr, features, hidden, 3, 1, SKIP)
        at = add_row(start, left, middle, right, taps_ptr, features, hidden, 0, 1, SKIP)
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
    taps_ptr,  # [hidden, 9]
    bias_ptr,  # [hidden]
    norm_weight_ptr,  # [hidden]
    norm_bias_ptr,
    output_ptr,  # T [B, H, W, hidden]
    grad_z_ptr,  # dZ [B, H, W, hidden]
    partial_ptr,  # [programs of axes 0 and 1, 2, hidden]: gradients of the norm's weight and bias
    height,
    width,
    hidden: tl.constexpr,
    bands,
    band_rows,
    eps,
    SKIP: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    NORM_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BW: tl.constexpr,
    BH: tl.constexpr,
):
    batch = (tl.program_id(0) // bands).to(tl.int64)
    first = tl.program_id(0) % bands * band_rows
    last = tl.minimum(first + band_rows, height)
    columns = tl.program_id(1) * BW + tl.arange(0, BW)
    features = tl.program_id(2) * BH + tl.arange(0, BH)
    image = batch * height * width * hidden
    hidden_ptr += image
    bias = load_vector(bias_ptr, features, hidden, BIAS, 0.0)
    start = tl.zeros([BW, BH], tl.float32) + bias[None, :]
    above = start
    at = start
    grad_weight = tl.zeros([BH], tl.float32)
    grad_bias = tl.zeros([BH], tl.float32)
    for row in range(first - 1, last + 1):
        left = load_row(hidden_ptr, row, columns - 1, features, height, width, hidden)  # [BW, BH]
        middle = load_row(hidden_ptr, row, columns, features, height, width, hidden)
        right = load_row(hidden_ptr, row, columns + 1, features, height, width, hidden)
        z = add_row(above, left, middle, right, taps_ptr, features, hidden, 6, 1, SKIP)
        above = add_row(at, left, middle, right, taps_ptr, features, hidden, 3, 1, SKIP)
        at = add_row(start, left, middle, right, taps_ptr, features, hidden, 0, 1, SKIP)
        if row > first:
            grad = load_row(grad_ptr + image, row - 1, columns, features, height, width, hidden)
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
        partial = partial_ptr + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * 2 * hidden
        tl.store(partial + features, grad_weight, mask=features < hidden)
        tl.store(partial + hidden + features, grad_bias, mask=features < hidden)


@triton.jit
def mix_ffn_convolution_backward_kernel(
    grad_z_ptr,  # dZ [B, H, W, hidden]
    hidden_ptr,  # U [B, H, W, hidden]
    taps_ptr,  # [hidden, 9]
    grad_hidden_ptr,  # dU [B, H, W, hidden]
    partial_ptr,  # [programs of axes 0 and 1, 11, hidden]: gradients of the taps, of b_d and of b_1
    height,
    width,
    hidden: tl.constexpr,
    bands,
    band_rows,
    SKIP: tl.constexpr,
    BW: tl.constexpr,
    BH: tl.constexpr,
):
    """dU = transposed convolution of dZ; tap (i, j) gets the sum over tokens of dZ at (r, c) times U at (r + i, c +
    j)."""
    batch = (tl.program_id(0) // bands).to(tl.int64)
    first = tl.program_id(0) % bands * band_rows
    last = tl.minimum(first + band_rows, height)
    columns = tl.program_id(1) * BW + tl.arange(0, BW)
    features = tl.program_id(2) * BH + tl.arange(0, BH)
    image = batch * height * width * hidden
    hidden_ptr += image
    grad_z_ptr += image
    zeros = tl.zeros([BW, BH], tl.float32)
    above = zeros  # dU of the row before last so far, and of the last one
    at = zeros
    tap0 = zeros
    tap1 = zeros
    tap2 = zeros
    tap3 = zeros
    tap4 = zeros
    tap5 = zeros
    tap6 = zeros
    tap7 = zeros
    tap8 = zeros
    grad_bias = zeros
    grad_hidden_bias = zeros
    for row in range(first - 1, last + 1):
        left = load_row(grad_z_ptr, row, columns - 1, features, height, width, hidden)  # [BW, BH]
        middle = load_row(grad_z_ptr, row, columns, features, height, width, hidden)
        right = load_row(grad_z_ptr, row, columns + 1, features, height, width, hidden)
        grad_hidden = add_row(above, left, middle, right, taps_ptr, features, hidden, 2, -1, SKIP)
        above = add_row(at, left, middle, right, taps_ptr, features, hidden, 5, -1, SKIP)
        at = add_row(zeros, left, middle, right, taps_ptr, features, hidden, 8, -1, SKIP)
        if row > first:
            store_row(grad_hidden_ptr + image, grad_hidden, row - 1, columns, features, width, hidden)
            grad_hidden_bias += tl.where((columns < width)[:, None], grad_hidden, 0.0)
        # U of the band's own rows only: every token of U belongs to one program
        own = (row >= first) & (row < last)
        if own:
            grad_bias += middle
        u = load_row(hidden_ptr, tl.where(row - 1 >= first, row - 1, -1), columns, features, height, width, hidden)
        tap0 += right * u
        tap1 += middle * u
        tap2 += left * u
        u = load_row(hidden_ptr, tl.where(own, row, -1), columns, features, height, width, hidden)
        tap3 += right * u
        tap4 += middle * u
        tap5 += left * u
        u = load_row(hidden_ptr, tl.where(row + 1 < last, row + 1, -1), columns, features, height, width, hidden)
        tap6 += right * u
        tap7 += middle * u
        tap8 += left * u
    partial = partial_ptr + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * 11 * hidden + features
    inside = features < hidden
    tl.store(partial, tl.sum(tap0, 0), mask=inside)
    tl.store(partial + hidden, tl.sum(tap1, 0), mask=inside)
    tl.store(partial + 2 * hidden, tl.sum(tap2, 0), mask=inside)
    tl.store(partial + 3 * hidden, tl.sum(tap3, 0), mask=inside)
    tl.store(partial + 4 * hidden, tl.sum(tap4, 0), mask=inside)
    tl.store(partial + 5 * hidden, tl.sum(tap5, 0), mask=inside)
    tl.store(partial + 6 * hidden, tl.sum(tap6, 0), mask=inside)
    tl.store(partial + 7 * hidden, tl.sum(tap7, 0), mask=inside)
    tl.store(partial + 8 * hidden, tl.sum(tap8, 0), mask=inside)
    tl.store(partial + 9 * hidden, tl.sum(grad_bias, 0), mask=inside)
    tl.store(partial + 10 * hidden, tl.sum(grad_hidden_bias, 0), mask=inside)
