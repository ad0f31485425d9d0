"""Hands an `nn.LayerNorm` to the operators that fuse it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from msformer_kernels.nn.honest import weight_and_bias, why_any_is_called, why_layer_norm, why_other_dtype


def why_norm_is_called(norm: Any, x: Tensor) -> str | None:
    """Why a norm of x before a layer must be called; None if there is none, or the layer may fuse it."""
    if norm is None:
        return None
    return why_any_is_called() or why_layer_norm(norm) or why_other_dtype(norm, x.dtype, x.device.type)


def norm_arguments(norm: nn.LayerNorm | None, channels: int, x: Tensor) -> tuple[Tensor | None, Tensor | None, float]:
    """(weight, bias, eps) of a LayerNorm over so many channels, for tokens like x; weight is None without a norm."""
    if norm is None:
        return None, None, 1e-5
    if norm.normalized_shape != (channels,):
        raise ValueError(f"norm: expected a LayerNorm over {channels} channels, got {tuple(norm.normalized_shape)}")
    weight, bias = weight_and_bias(norm)
    if weight is None:
        weight = torch.ones(channels, dtype=x.dtype, device=x.device)
    return weight, bias, norm.eps
