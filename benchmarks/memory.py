"""Memory of this process: the peak of a call, and a limit that makes a call fail where it would be killed.

On Linux only; elsewhere the peak is not known, and there is no limit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def _status(field: str) -> int | None:
    """A size in /proc/self/status, bytes."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def peak_memory(call: Callable[[], object]) -> int | None:
    """Bytes of resident memory that a call adds at its peak to what there was before; None where that is not known."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that is kept for later would hide what the call needs
    before = _status("VmRSS")
    try:
        _RESET.write_text("5")  # the peak is counted from here
    except OSError:
        return None
    call()
    peak = _status("VmHWM")
    return None if before is None or peak is None else max(0, peak - before)


@contextmanager
def limited_memory() -> Iterator[None]:
    """Within the block, an allocation beyond the memory that is free now raises an error of the one who asked."""
    try:
        import resource
    except ImportError:
        yield
        return
    import psutil

    used = _status("VmSize")
    before = resource.getrlimit(resource.RLIMIT_AS)
    if used is None:
        yield
        return
    limit = used + psutil.virtual_memory().available
    resource.setrlimit(resource.RLIMIT_AS, (limit if before[1] < 0 else min(limit, before[1]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
