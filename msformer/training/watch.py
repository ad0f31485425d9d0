"""What a training shows while it goes: a live bar on a terminal, elsewhere a line every few seconds; the time left."""

from __future__ import annotations

import time
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from msformer.messages import console, tell_progress, warn
from msformer.text import visible

LINE_EVERY = 10.0
"""Seconds between lines where there is no terminal."""


class Watch:
    """A context manager around work of `count` steps, `done` of which were done before.

    Args:
        what: the work, in a word or two.
        count: steps.
        done: steps that were done before.
        shown: False for all but one of several processes.
    """

    def __init__(self, what: str, count: int, done: int = 0, shown: bool = True) -> None:
        self._what, self._count, self._shown = what, count, shown
        self._console = console()
        self._first, self._begun = done, time.monotonic()
        self._last_line = self._begun
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[details]}", markup=False),
            console=self._console,
            transient=True,
            disable=not (shown and self._console.is_terminal),
        )
        self._task = self._bar.add_task(what, total=count, completed=done, details="")

    def __enter__(self) -> Watch:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, done: int, details: str = "") -> None:
        """`done` steps are done."""
        if not self._shown:
            return
        now = time.monotonic()
        text = "; ".join(part for part in (details, self._left(done, now)) if part)
        self._bar.update(self._task, completed=done, details=text)
        tell_progress(self._what, done, self._count, text)
        if not self._console.is_terminal and (now - self._last_line >= LINE_EVERY or done == self._count > self._first):
            self._last_line = now
            self.say(f"{self._what} {done}/{self._count}" + (f": {text}" if text else ""))

    def say(self, line: str) -> None:
        """Prints a line."""
        if self._shown:
            self._console.print(Text(visible(line)), soft_wrap=True)

    def warn(self, text: str) -> None:
        """As `msformer.messages.warn`, of the first of several processes."""
        if self._shown:
            warn(text)

    def _left(self, done: int, now: float) -> str:
        if done <= self._first or done >= self._count:
            return ""
        seconds = (now - self._begun) / (done - self._first) * (self._count - done)
        return f"about {seconds:.0f} s left" if seconds < 100 else f"about {seconds / 60:.0f} min left"
