"""How much memory a call needs at its peak."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(call: Callable[[], object], model: nn.Module) -> int | None:
    """Bytes that a call adds at its peak: of the model's GPU, else resident memory (Linux; elsewhere None)."""
    on_gpu = next((p.device for p in model.parameters() if p.is_cuda), None)
    if on_gpu is not None:
        torch.cuda.reset_peak_memory_stats(on_gpu)
        before = torch.cuda.memory_allocated(on_gpu)
        call()
        return torch.cuda.max_memory_allocated(on_gpu) - before
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that is kept for later would hide what the call needs
    try:
        resident = _status("VmRSS")
        _RESET.write_text("5")  # the peak is counted from here
    except OSError:
        return None
    call()
    return max(0, _status("VmHWM") - resident)


def _status(field: str) -> int:
    found = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(found.split()[1]) * 1024
