"""What the Triton kernels share: rounding, products, LayerNorm of rows, sums over splits, and how work is cut up.

Kernels of an operator live in its folder (`triton_kernels.py`). Conventions, as in their shape comments: N tokens,
C channels, D key features, V value features, H hidden features; BN, BC, ... are the sizes of a tile, powers of two, whose
padding is masked. Tensors come with their strides and are never copied to be contiguous; offsets that are multiplied by a
stride are 64-bit. Statistics and accumulators are float32.

Sums over tokens are cut into splits; every program writes the partial sums of its split, and another kernel adds them in
a fixed order. So results are the same bits in every run on the same device; nothing is summed by atomics.

Under ``TRITON_INTERPRET=1`` (set before the first import) the kernels run on CPU tensors, in NumPy. Its interpreter
truncates to bfloat16 and multiplies bfloat16 as integers, so `narrow` and `dot` do both by hand there.
"""

from __future__ import annotations

import os
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def block_size(size: int, least: int = 16, most: int = 1 << 20) -> int:
    """The power of two that covers `size`, within bounds (16 is the least that tensor cores take)."""
    return max(least, min(most, triton.next_power_of_2(max(1, size))))


def dot_precision(dtype: torch.dtype, exact: bool = False) -> str:
    """``input_precision`` of float32 products, for activations of `dtype`.

    float32 follows PyTorch's setting for matrix products. Where that asks for full float32, products of three tf32 terms
    give it on NVIDIA's tensor cores (error near that of float32, several times faster than its multipliers). For
    bfloat16 and float16 one tf32 term is finer than the dtype; `exact` asks for three for results that stay float32.
    """
    full = "ieee" if torch.version.hip else "tf32x3"
    if dtype != torch.float32:
        return full if exact or torch.version.hip else "tf32"
    if torch.version.hip:
        return full
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    tf32 = torch.backends.cuda.matmul.allow_tf32 if setting is None else setting == "tf32"
    return "tf32" if tf32 else full


@lru_cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def split_tokens(tokens: int, block: int, others: int, device: torch.device) -> tuple[int, int]:
    """(number of splits, tokens in each) so that with `others` programs a split every processor has one."""
    blocks = max(1, triton.cdiv(tokens, block))
    wanted = max(1, processors(device) // max(1, others))
    per_split = triton.cdiv(blocks, wanted)
    return triton.cdiv(blocks, per_split), per_split * block


def mask_arguments(mask: Tensor | None, like: Tensor) -> tuple[Tensor, int, int]:
    """A boolean `[B, N]` as bytes and its strides; any tensor where there is none."""
    return (like, 0, 0) if mask is None else (mask.view(torch.uint8), *mask.stride())


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x in `dtype`, rounded to nearest."""
    if INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x == x, rounded, 0x7FC0)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def dot(a, b, dtype: tl.constexpr, precision: tl.constexpr):
    """a @ b of operands rounded to `dtype`, summed in float32."""
    a = narrow(a, dtype)
    b = narrow(b, dtype)
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b, input_precision=precision)


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
def normalize_rows(x, columns, count, eps):
    """Rows with mean 0 and variance 1, zeros in the padding, and 1 / sqrt(variance + eps) of each."""
    mean = tl.sum(x, 1) / count
    centred = tl.where((columns < count)[None, :], x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / count + eps)
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
    """Gradient of the logits of a softmax over each row. The mean is taken out twice: the second time mends the rounding of
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
    channels,
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
):
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


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of x (plus `residual`), and of weight and bias in float32; `grad` `[B, N, C]` is contiguous."""
    batch, tokens, channels = x.shape
    columns = block_size(channels)
    rows = max(1, 4096 // columns)
    splits, size = split_tokens(tokens, rows * 4, batch, x.device)
    grad_x = x.new_empty(x.shape)
    partial = x.new_empty(batch * splits, 2, channels, dtype=torch.float32)
    added = grad if residual is None else residual
    layer_norm_backward_kernel[(batch, splits)](
        grad,
        x,
        added,
        weight,
        grad_x,
        partial,
        tokens,
        channels,
        size,
        eps,
        *x.stride(),
        *added.stride(),
        RESIDUAL=residual is not None,
        BN=rows,
        BC=columns,
        num_warps=4,
    )
    grad_weight, grad_bias = partial.sum(0)
    return grad_x, grad_weight, grad_bias


# How each kernel is launched, by class of width (the power of two that covers the channels) and bytes of an element:
# tokens of a tile (BN), warps, and stages of the software pipeline. Never by the number of tokens.
_LAUNCH: dict[str, dict[tuple[int, int], dict[str, int]]] = {
    "key_tokens": {
        (64, 2): {"BN": 64, "BD": 64, "num_warps": 4, "num_stages": 3},
        (64, 4): {"BN": 64, "BD": 64, "num_warps": 4, "num_stages": 2},
        (128, 2): {"BN": 64, "BD": 128, "num_warps": 8, "num_stages": 3},
        (128, 4): {"BN": 32, "BD": 64, "num_warps": 8, "num_stages": 2},
    },
    "self_output": {
        (64, 2): {"BN": 64, "num_warps": 4, "num_stages": 2},
        (64, 4): {"BN": 64, "num_warps": 4, "num_stages": 2},
        (128, 2): {"BN": 64, "num_warps": 4, "num_stages": 2},
        (128, 4): {"BN": 32, "num_warps": 4, "num_stages": 1},
    },
    "query_backward": {
        (64, 2): {"BN": 64, "num_warps": 4, "num_stages": 2},
        (64, 4): {"BN": 32, "num_warps": 4, "num_stages": 2},
        (128, 2): {"BN": 32, "num_warps": 8, "num_stages": 2},
        (128, 4): {"BN": 32, "num_warps": 8, "num_stages": 1},
    },
    "token_backward": {
        (64, 2): {"BN": 64, "num_warps": 4, "num_stages": 2},
        (64, 4): {"BN": 32, "num_warps": 4, "num_stages": 2},
        (128, 2): {"BN": 32, "num_warps": 8, "num_stages": 2},
        (128, 4): {"BN": 32, "num_warps": 8, "num_stages": 1},
    },
    # of values a program holds (tile), and features of them where a program need not hold all (BH)
    "activation": {
        (2048, 2): {"tile": 4096, "BH": 64, "num_warps": 8, "num_stages": 2},
        (2048, 4): {"tile": 4096, "BH": 64, "num_warps": 8, "num_stages": 2},
    },
    "activation_backward": {
        (2048, 2): {"tile": 2048, "BH": 64, "num_warps": 8, "num_stages": 2},
        (2048, 4): {"tile": 2048, "BH": 64, "num_warps": 8, "num_stages": 2},
    },
    "convolution_backward": {
        (2048, 2): {"tile": 1024, "BH": 64, "num_warps": 4, "num_stages": 1},
        (2048, 4): {"tile": 1024, "BH": 64, "num_warps": 4, "num_stages": 1},
    },
}


def launch_options(kernel: str, width: int, like: Tensor) -> dict[str, int]:
    """Tile sizes and launch options of a kernel for this many channels and the dtype of `like`."""
    table = _LAUNCH[kernel]
    classes = sorted({size for size, _ in table})
    size = next((size for size in classes if width <= size), classes[-1])
    return dict(table[size, like.element_size()])
