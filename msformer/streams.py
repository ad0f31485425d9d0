"""CUDA streams for fits that run side by side: each has its own for as long as it runs."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_free: dict[torch.device, list[torch.cuda.Stream]] = defaultdict(list)


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """On a GPU, what is launched within the block is on a stream that no other thread in such a block has.

    Streams are used again, as PyTorch has 32 of them and keeps workspaces of libraries for each.
    """
    if device.type != "cuda":
        yield
        return
    with _lock:
        stream = _free[device].pop() if _free[device] else torch.cuda.Stream(device)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        stream.synchronize()
        with _lock:
            _free[device].append(stream)
