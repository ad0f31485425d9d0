"""Keeps freed memory in the process while an image is fitted.

Every step allocates and frees the same large tensors. By default glibc gives blocks above 32 MiB back to the system at
once, and the next step pays for clearing and mapping their pages again: at 257 x 257 a tenth of its time.
"""

from __future__ import annotations

import ctypes
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_DYNAMIC = 32 << 20  # where glibc's own, dynamic thresholds end

_lock = threading.Lock()
_within = 0


@contextmanager
def kept_memory() -> Iterator[None]:
    """Within the block, freed memory stays with the process; afterwards large blocks go back to the system again.

    With another C library than glibc nothing happens. The setting is that of the whole process, until the last of the
    threads that are within such a block leaves it.
    """
    global _within
    library = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
    if library is None:
        yield
        return
    with _lock:
        _within += 1
        library.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        with _lock:
            _within -= 1
            if _within == 0:
                library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_DYNAMIC)
                library.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_DYNAMIC)
