"""Hands an `nn.LayerNorm` to the operators that fuse it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def norm_arguments(norm: nn.LayerNorm | None, x: Tensor) -> tuple[Tensor | None, Tensor | None, float]:
    """(weight, bias, eps) of a LayerNorm over the channels of x; weight is None without a norm."""
    if norm is None:
        return None, None, 1e-5
    if tuple(norm.normalized_shape) != (x.shape[-1],):
        raise ValueError(f"norm: expected a LayerNorm over {x.shape[-1]} channels, got {tuple(norm.normalized_shape)}")
    weight = norm.weight
    if weight is None:
        weight = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
    return weight, norm.bias, norm.eps
