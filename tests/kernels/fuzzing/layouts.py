"""Memory layouts that tensors may come in, by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.kernels.cases.base import strided

OF_WEIGHTS = ("transposed", "sliced", "unaligned", "last_first")
"""Those in which a tensor keeps its values."""
LAYOUTS = (*OF_WEIGHTS, "expanded", "one_token", "one_value", "windows")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x in this layout. Expanded ones repeat values of x, and so have others than x."""
    if layout == "unaligned":  # at an odd address of an allocation
        storage = torch.zeros(x.numel() + 1, dtype=x.dtype)
        storage[1:] = x.flatten()
        return storage[1:].view(x.shape)
    if layout == "last_first":  # the first dim is the fastest
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "one_token":  # one token for all
        return x if x.dim() < 2 else x[..., :1, :].expand_as(x)
    if layout == "one_value":
        return x if x.numel() == 0 else x.flatten()[:1].view([1] * x.dim()).expand_as(x)
    if layout == "windows":  # each token starts one value after the one before
        return x if x.dim() < 2 or x.numel() == 0 else _windows(x)
    if layout == "transposed" and x.dim() < 2:
        return x
    return strided(x, layout)


def _windows(x: Tensor) -> Tensor:
    *leading, tokens, channels = x.shape
    row = torch.zeros(*leading, tokens + channels - 1, dtype=x.dtype)
    row[..., :channels] = x[..., 0, :]
    row[..., channels - 1 :] = x[..., :, -1]
    return row.as_strided(x.shape, (*row.stride()[:-1], 1, 1))


class _GradientLaidOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: str) -> Tensor:
        ctx.layout = layout
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return laid_out(grad, ctx.layout), None


def with_gradient_laid_out(output: Tensor, layout: str) -> Tensor:
    """The output, to which its gradient comes in this layout."""
    return output if layout == "contiguous" else _GradientLaidOut.apply(output, layout)
