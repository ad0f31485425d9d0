"""What a run shows while it goes: a live bar on a terminal, a line an image elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from msformer.segmentation import Progress as StepProgress


class RunProgress:
    """A context manager around a run over `images` images of up to `max_steps` steps each."""

    def __init__(self, images: int, max_steps: int) -> None:
        self._console = Console()
        self._images = images
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
        self._fit: TaskID = self._bars.add_task("", total=max_steps, details="", visible=False)

    def __enter__(self) -> RunProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        if self._skipped:
            self._print(f"{self._skipped} of {self._images} images were already done with these settings")

    def start(self, name: str) -> StepProgress:
        """The next image; returns what `segment` is to call before each step."""
        self._bars.reset(self._fit, description=name, visible=True, details="")

        def step(number: int, labels: int, loss: float) -> None:
            self._bars.update(self._fit, completed=number, details=f"{labels} labels, loss {loss:.3f}")

        return step

    def skipped(self) -> None:
        self._skipped += 1
        self._advance()

    def finished(self, name: str, record: dict[str, Any]) -> None:
        self._advance()
        self._print(
            f"[{self._done}/{self._images}] {name}: {record['labels']} labels after {record['steps']} steps, "
            f"loss {record['losses'][-1]:.3f}, {record['seconds']:.1f} s"
        )

    def failed(self, name: str, error: str) -> None:
        self._advance()
        self._print(f"[{self._done}/{self._images}] {name}: failed: {error}")

    def _advance(self) -> None:
        self._done += 1
        self._bars.advance(self._all)
        self._bars.update(self._fit, visible=False)

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
