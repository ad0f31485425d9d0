"""BatchNorm of tokens through Triton kernels (triton_kernels.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msformer_kernels.core.gradients import placed
from msformer_kernels.ops.batch_norm.triton_kernels import (
    batch_norm_combine_statistics_kernel,
    batch_norm_gradient_kernel,
    batch_norm_gradient_sums_kernel,
    batch_norm_normalize_kernel,
    batch_norm_statistics_kernel,
)
from msformer_kernels.triton.device import compile_options
from msformer_kernels.triton.launch import alignment, block_size, cdiv, split_tokens

_TILE = 4096  # values of a program


def _blocks(channels: int) -> dict[str, int]:
    columns = block_size(channels, most=128)
    return {"BN": _TILE // columns, "BC": columns, "num_warps": 4, **compile_options()}


def forward(call: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias, eps = call
    batch, tokens, channels = x.shape
    blocks = _blocks(channels)
    tiles = cdiv(channels, blocks["BC"])
    splits, size = split_tokens(tokens, blocks["BN"], batch * tiles, x.device)
    partials = x.new_empty(batch * splits, 4, channels, dtype=torch.float32)
    batch_norm_statistics_kernel[(batch, splits, tiles)](
        x, partials, tokens, channels, size, *x.stride(), ALIGN=alignment(x), **blocks
    )
    mean, variance = (x.new_empty(channels, dtype=torch.float32) for _ in range(2))
    batch_norm_combine_statistics_kernel[(cdiv(channels, 16),)](
        partials, mean, variance, batch * splits, channels, BS=64, BC=16, num_warps=4, **compile_options()
    )
    output = x.new_empty(x.shape)
    batch_norm_normalize_kernel[(batch * cdiv(tokens, blocks["BN"]), tiles)](
        x,
        mean,
        variance,
        mean if weight is None else weight.contiguous(),
        mean if bias is None else bias.contiguous(),
        output,
        tokens,
        channels,
        eps,
        *x.stride(),
        WEIGHT=weight is not None,
        BIAS=bias is not None,
        ALIGN=alignment(x),
        **blocks,
    )
    return output, mean, variance


def backward(call: Any, saved: Any, grads: Any) -> tuple[Tensor, ...]:
    x, weight, bias, eps = call
    mean, variance = saved
    grad_output = grads.output
    batch, tokens, channels = x.shape
    blocks = _blocks(channels)
    tiles = cdiv(channels, blocks["BC"])
    splits, size = split_tokens(tokens, blocks["BN"], batch * tiles, x.device)
    partials = x.new_empty(batch * splits, 2, channels, dtype=torch.float32)
    strides = *grad_output.stride(), *x.stride()
    align = alignment(grad_output, x)
    batch_norm_gradient_sums_kernel[(batch, splits, tiles)](
        grad_output, x, mean, variance, partials, tokens, channels, size, eps, *strides, ALIGN=align, **blocks
    )
    sums = partials.sum(0)
    grad_x = x.new_empty(x.shape)
    batch_norm_gradient_kernel[(batch * cdiv(tokens, blocks["BN"]), tiles)](
        grad_output,
        x,
        mean,
        variance,
        mean if weight is None else weight.contiguous(),
        sums,
        grad_x,
        tokens,
        channels,
        1.0 / (batch * tokens),
        eps,
        *strides,
        WEIGHT=weight is not None,
        ALIGN=align,
        **blocks,
    )
    return grad_x, *placed((sums[1], sums[0]), (weight, bias), x)
