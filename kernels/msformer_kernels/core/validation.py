"""Checks of arguments, with errors that name the argument, what came and what was expected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from msformer_kernels.core.precision import autocast_enabled


def check_rank(name: str, tensor: Tensor, layout: str, rank: int) -> None:
    if tensor.dim() != rank:
        raise ValueError(f"{name}: expected {layout}, got shape {tuple(tensor.shape)}")


def check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...], layout: str) -> None:
    """A tensor of this shape; None passes."""
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected {layout} = {shape}, got {tuple(tensor.shape)}")


def check_same_kind(tensors: Sequence[tuple[str, int, bool]], call: Sequence[Any]) -> None:
    """Of the tensors (name, position in the call, whether it may be float32 beside a narrower first) the first is
    floating point, and the others have its device and, outside autocast, its dtype; None passes."""
    first = call[0]
    dtype, device = first.dtype, first.device
    if not dtype.is_floating_point:
        raise TypeError(f"{tensors[0][0]}: expected a floating-point tensor, got {dtype}")
    for name, position, wide in tensors[1:]:
        other = call[position]
        if other is None:
            continue
        if other.device != device:
            raise ValueError(f"{name}: is on {other.device}, but {tensors[0][0]} is on {device}")
        if other.dtype == dtype or (wide and other.dtype is torch.float32 and dtype.itemsize < 4):
            continue
        if not (other.is_floating_point() and autocast_enabled(device.type)):
            raise TypeError(f"{name}: has dtype {other.dtype}, but {tensors[0][0]} has {dtype}")


def check_mask(mask: Tensor | None, batch: int, tokens: int, device: torch.device) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected a boolean tensor (True keeps the token), got {mask.dtype}")
    check_shape("mask", mask, (batch, tokens), "[B, N]")
    if mask.device != device:
        raise ValueError(f"mask: is on {mask.device}, but the tokens are on {device}")


def check_memory(
    memory_key: Tensor | None, memory_value: Tensor | None, heads: int, key_channels: int, value_channels: int
) -> None:
    """Of memory tokens; channels are those of one head."""
    if memory_key is not None and memory_value is not None:
        check_rank("memory_key", memory_key, "[heads, M, Dk]", 3)
        memory = memory_key.shape[1]
        check_shape("memory_key", memory_key, (heads, memory, key_channels), "[heads, M, Dk] of one head")
        check_shape("memory_value", memory_value, (heads, memory, value_channels), "[heads, M, Dv] of one head")
    elif memory_key is not None or memory_value is not None:
        given, other = ("memory_key", "memory_value") if memory_value is None else ("memory_value", "memory_key")
        raise ValueError(f"{other}: expected a tensor beside {given}, got None")


def check_heads(num_heads: int, **channels: int) -> None:
    if num_heads < 1:
        raise ValueError(f"num_heads: expected at least 1, got {num_heads}")
    for name, count in channels.items():
        if count % num_heads:
            raise ValueError(f"num_heads: {num_heads} does not divide {name} = {count}")


def check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")


def check_norm(prefix: str, weight: Tensor | None, bias: Tensor | None, channels: int) -> None:
    if weight is None and bias is not None:
        raise ValueError(f"{prefix}_bias: given without {prefix}_weight, which switches the LayerNorm on")
    check_shape(f"{prefix}_weight", weight, (channels,), "[channels]")
    check_shape(f"{prefix}_bias", bias, (channels,), "[channels]")
