"""Which precision arithmetic is done in: of sums and statistics, of float32 products, of autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and statistics are kept in for activations of `dtype`: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tf32_allowed() -> bool:
    """Whether PyTorch may round the operands of float32 products to tf32 on a GPU, as of now.

    Asked as PyTorch 2.9 has it, if it does: the older question raises where the user answered the newer one.
    """
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return torch.backends.cuda.matmul.allow_tf32 if setting is None else setting == "tf32"


def cpu_float32_precision() -> str:
    """How exact products of float32 tensors on a CPU are to be, as of now: "highest", "high" or "medium".

    That is `torch.get_float32_matmul_precision`, which raises where the user mixed it with the newer settings of
    `torch.backends`; there oneDNN's own setting counts, which PyTorch's products follow.
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        setting = getattr(torch.backends.mkldnn, "matmul").fp32_precision  # noqa: B009 (mypy does not know it)
        return {"tf32": "high", "bf16": "medium"}.get(setting, "highest")


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Within it float32 products are "highest", or "high": with tf32 (see `torch.set_float32_matmul_precision`)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for a device type. The meta device has none, and PyTorch refuses to answer for it."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)
