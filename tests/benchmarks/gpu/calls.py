"""What items of the tests call in worker processes, which import nothing else for it."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from benchmarks.gpu.items import Skip


def echo(**arguments: Any) -> dict[str, Any]:
    return arguments | {"variable": os.environ.get("GPU_CHECK_TEST", "")}


def slow(seconds: float) -> dict[str, Any]:
    time.sleep(seconds)
    return {"slept": seconds}


def wrong() -> None:
    raise ValueError("of no use")


def unfit() -> None:
    raise Skip("not on this machine")


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)
