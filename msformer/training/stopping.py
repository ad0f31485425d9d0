"""Ctrl-C and SIGTERM as a wish to stop soon, with everything kept; the second one stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Wish:
    """Whether to stop."""

    asked = False


@contextmanager
def stop_on_request() -> Iterator[Wish]:
    """Within the block, the first of the signals is a wish that the block looks at; in the main thread only."""
    wish = Wish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        wish.asked = True
        restore()

    for number in _SIGNALS:
        before[number] = signal.signal(number, note)
    try:
        yield wish
    finally:
        restore()
