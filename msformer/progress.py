"""What a run shows while it goes: a live bar on a terminal, a line an image elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from msformer.segmentation import Progress as StepProgress


class RunProgress:
    """A context manager around a run over `images` images of up to `max_steps` steps each, several at a time."""

    def __init__(self, images: int, max_steps: int) -> None:
        self._console = Console()
        self._images = images
        self._max_steps = max_steps
        self._lock = threading.Lock()
        self._done = 0
        self._skipped = 0
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[details]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._all: TaskID = self._bars.add_task("images", total=images, details="")
        self._fits: dict[str, TaskID] = {}

    def __enter__(self) -> RunProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        if self._skipped:
            self._print(f"{self._skipped} of {self._images} images were already done with these settings")

    def start(self, name: str, check: Callable[[], None] = lambda: None) -> StepProgress:
        """The next image; returns what `segment` is to call before each step, which calls `check` first."""
        fit = self._fits[name] = self._bars.add_task(name, total=self._max_steps, details="")

        def step(number: int, labels: int, loss: float) -> None:
            check()
            self._bars.update(fit, completed=number, details=f"{labels} labels, loss {loss:.3f}")

        return step

    def skipped(self) -> None:
        with self._lock:
            self._skipped += 1
            self._done += 1
        self._bars.advance(self._all)

    def finished(self, name: str, record: dict[str, Any]) -> None:
        self._ended(
            name,
            f"{record['labels']} labels after {record['steps']} steps, "
            f"loss {record['losses'][-1]:.3f}, {record['seconds']:.1f} s",
        )

    def failed(self, name: str, error: str) -> None:
        self._ended(name, f"failed: {error}")

    def _ended(self, name: str, outcome: str) -> None:
        if name in self._fits:
            self._bars.remove_task(self._fits.pop(name))
        self._bars.advance(self._all)
        with self._lock:
            self._done += 1
            self._print(f"[{self._done}/{self._images}] {name}: {outcome}")

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
