"""Which dtype arithmetic is done in: that of sums and statistics, and that of autocast."""

from __future__ import annotations

import torch


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and statistics are kept in for activations of `dtype`: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for a device type. The meta device has none, and PyTorch refuses to answer for it."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)
