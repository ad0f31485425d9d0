"""The host side of the Triton kernels: how work is cut up, and with which tiles each kernel is launched.

Sums over tokens are cut into splits; every program writes the partial sums of its split, and another kernel adds them
in a fixed order. So results are the same bits in every run on the same device; nothing is summed by atomics.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from msformer_kernels.core.precision import tf32_allowed
from msformer_kernels.triton.device import architecture, compile_options
from msformer_kernels.triton.tiles import layer_norm_backward_kernel, round_to_tf32_kernel

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def cdiv(count: int, size: int) -> int:
    """Tiles of `size` that cover `count`; `triton.cdiv` from Python takes twenty times as long."""
    return -(-count // size)


def block_size(size: int, least: int = 16, most: int = 1 << 20) -> int:
    """The power of two that covers `size`, within bounds (16 is the least that tensor cores take)."""
    return max(least, min(most, 1 << (max(1, size) - 1).bit_length()))


def dot_precision(dtype: torch.dtype, exact: bool = False) -> str:
    """``input_precision`` of float32 products, for activations of `dtype`.

    float32 follows PyTorch's setting for matrix products. Where that asks for full float32, products of three tf32
    terms give it on NVIDIA's tensor cores (error near that of float32).
    For bfloat16 and float16 one tf32 term is finer than the dtype; `exact` asks for three for results that stay
    float32.
    """
    if architecture() == "gfx942":
        return "ieee"
    if dtype != torch.float32:
        return "tf32x3" if exact else "tf32"
    return "tf32" if tf32_allowed() else "tf32x3"


def rounded_weight(weight: Tensor, precision: str) -> Tensor:
    """A contiguous weight as products of this precision take it."""
    if weight.dtype != torch.float32 or precision != "tf32":
        return weight
    rounded = torch.empty_like(weight)
    round_to_tf32_kernel[(cdiv(weight.numel(), 1024),)](
        weight, rounded, weight.numel(), BLOCK=1024, **compile_options()
    )
    return rounded


@lru_cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def split_tokens(tokens: int, block: int, others: int, device: torch.device) -> tuple[int, int]:
    """(number of splits, tokens in each) so that with `others` programs a split every processor has one."""
    blocks = max(1, cdiv(tokens, block))
    wanted = max(1, processors(device) // max(1, others))
    per_split = cdiv(blocks, wanted)
    return cdiv(blocks, per_split), per_split * block


def alignment(*tensors: Tensor) -> int:
    """The largest power of two, up to 16 bytes, that divides every stride but those of the last dims, and of dims of
    size 1, which are never stepped over; in elements."""
    largest = 16 // max(t.element_size() for t in tensors)
    return math.gcd(largest, *(s for t in tensors for n, s in zip(t.shape[:-1], t.stride()[:-1], strict=True) if n > 1))


def mask_arguments(mask: Tensor | None, like: Tensor) -> tuple[Tensor, int, int]:
    """A boolean `[B, N]` as bytes and its strides; any tensor where there is none."""
    if mask is None:
        return like, 0, 0
    by_batch, by_token = mask.stride()
    return mask.view(torch.uint8), by_batch, by_token


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
        weight.contiguous(),
        grad_x,
        partial,
        tokens,
        channels,
        size,
        eps,
        *x.stride(),
        *added.stride(),
        RESIDUAL=residual is not None,
        ALIGN=alignment(x, added),
        BN=rows,
        BC=columns,
        num_warps=4,
        **compile_options(),
    )
    grad_weight, grad_bias = partial.sum(0)
    return grad_x, grad_weight, grad_bias
