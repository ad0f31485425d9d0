"""What values a tensor of a call may have, by name. Each function makes them from random normal numbers and the dtype
that they are rounded to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _scattered(x: Tensor, value: float) -> Tensor:
    """One in about 20 values replaced, at least one; x itself where it is empty."""
    places = torch.rand(x.shape) < 0.05
    if x.numel():
        places.view(-1)[int(torch.randint(x.numel(), ()))] = True
    return x.masked_fill(places, value)


def _same_tokens(x: Tensor) -> Tensor:
    return x if x.dim() < 2 else x[..., :1, :].expand_as(x).clone()


VALUES: dict[str, Callable[[Tensor, torch.dtype], Tensor]] = {
    "normal": lambda x, dtype: x,
    "zeros": lambda x, dtype: torch.zeros_like(x),
    "negative_zeros": lambda x, dtype: -torch.zeros_like(x),
    "constant": lambda x, dtype: torch.full_like(x, 1.5),
    "same_tokens": lambda x, dtype: _same_tokens(x),
    "small": lambda x, dtype: x * 1e-3,
    "large": lambda x, dtype: x * 20,
    "offset": lambda x, dtype: x + 50,
    "sparse": lambda x, dtype: x * (torch.rand(x.shape) < 0.1),
    "nan": lambda x, dtype: _scattered(x, float("nan")),
    "inf": lambda x, dtype: _scattered(x, float("inf")),
    "negative_inf": lambda x, dtype: _scattered(x, float("-inf")),
    "huge": lambda x, dtype: _scattered(x, 0.7 * torch.finfo(dtype).max),
    "negative_huge": lambda x, dtype: _scattered(x, -0.7 * torch.finfo(dtype).max),
    "big": lambda x, dtype: _scattered(x, torch.finfo(dtype).max ** 0.4),
    "subnormal": lambda x, dtype: x * (torch.finfo(dtype).tiny / 4),
    "some_subnormal": lambda x, dtype: _scattered(x, torch.finfo(dtype).tiny / 16),
}
SPECIAL = ("nan", "inf", "negative_inf", "big", "huge", "negative_huge", "subnormal", "some_subnormal")
"""Those that overflow, or are too small for relative errors; what matters is where NaN and infinity come out."""
REGULAR = tuple(name for name in VALUES if name not in SPECIAL)
OVERFLOWING = ("huge", "negative_huge")
"""Those of SPECIAL whose sums may overflow in another order than eager's."""
