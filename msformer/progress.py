"""What a run over many items shows while it goes: live bars on a terminal, a line an item elsewhere; and the time
left.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from msformer.messages import console, tell_progress
from msformer.text import visible

Update = Callable[[int, int, str], None]


class RunProgress:
    """A context manager around a run over `count` items, several at a time; `what` they are, for the text.

    The time left is that of the items still to be made; how many there are is `to_make` where it is known before,
    otherwise all that were not skipped yet.
    """

    def __init__(self, count: int, what: str = "images", to_make: int | None = None) -> None:
        self._console = console()
        self._count, self._what = count, what
        self._lock = threading.Lock()
        self._to_make = to_make
        self._first_start: float | None = None
        self._made = self._skipped = 0
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[details]}", markup=False),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._all: TaskID = self._bars.add_task(what, total=count, details="")
        self._running: dict[str, TaskID] = {}

    def __enter__(self) -> RunProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        if self._skipped:
            self._print(f"{self._skipped} of {self._count} {self._what} were already done with these settings")

    def begin(self) -> None:
        """Something is made from now on, if nothing was before: the time that is taken counts."""
        if self._first_start is None:
            self._first_start = time.monotonic()

    def start(self, name: str) -> Update:
        """The next item; returns what is to be called as ``update(steps done, steps, details)``."""
        self.begin()
        bar = self._running[name] = self._bars.add_task(visible(name), total=None, details="")

        def update(done: int, steps: int, details: str = "") -> None:
            self._bars.update(bar, completed=done, total=steps, details=details)
            tell_progress(name, done, steps, details)

        return update

    def skipped(self) -> None:
        """An item was done before."""
        with self._lock:
            self._skipped += 1
            self._advance(1)

    def ended(self, name: str, outcome: str, items: int = 1) -> None:
        """An item is done or failed, or several are at once."""
        with self._lock:
            if name in self._running:
                self._bars.remove_task(self._running.pop(name))
            self._made += items
            self._advance(items)
            self._print(f"[{self._made + self._skipped}/{self._count}] {name}: {outcome}{self._time_left()}")

    def _advance(self, items: int) -> None:
        self._bars.update(self._all, advance=items, details=self._time_left().removeprefix("; "))

    def _time_left(self) -> str:
        left = (self._count - self._skipped if self._to_make is None else self._to_make) - self._made
        if left <= 0 or self._first_start is None or self._made == 0:
            return ""
        seconds = (time.monotonic() - self._first_start) / self._made * left
        return f"; about {seconds:.0f} s left" if seconds < 100 else f"; about {seconds / 60:.0f} min left"

    def _print(self, line: str) -> None:
        self._console.print(Text(visible(line)), soft_wrap=True)
