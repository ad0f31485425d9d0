"""Times of calls that take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

SHORTEST = 2e-3
"""Seconds; a call that takes less is repeated within a sample."""


def medians(run: Callable[[nn.Module], Any], rivals: Sequence[nn.Module], samples: int) -> list[float]:
    """Seconds of a call with each rival."""
    calls = [_calls(run, rival) for rival in rivals]
    times: list[list[float]] = [[] for _ in rivals]
    for _ in range(samples):
        for found, rival, count in zip(times, rivals, calls, strict=True):
            found.append(_seconds(run, rival, count))
    return [statistics.median(found) for found in times]


def _calls(run: Callable[[nn.Module], Any], rival: nn.Module) -> int:
    _seconds(run, rival, 1)  # the first call makes what the others find
    return max(1, round(SHORTEST / max(_seconds(run, rival, 1), 1e-6)))


def _seconds(run: Callable[[nn.Module], Any], rival: nn.Module, calls: int) -> float:
    """Of one call, the mean of a few."""
    on_gpu = next((p.device for p in rival.parameters() if p.is_cuda), None)
    start = time.perf_counter()
    for _ in range(calls):
        run(rival)
    if on_gpu is not None:
        torch.cuda.synchronize(on_gpu)
    return (time.perf_counter() - start) / calls
