"""The results, stage by stage, and their files: JSON and, beside it, the report."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .items import Item
from .preflight import Finding
from .processes import Outcome

VERSION = 2
NOT_BEGUN, NOT_CHOSEN, NEEDS_GPU = "not begun", "not chosen", "needs a GPU"
RUNNING, OK, FAILED, SKIPPED = "running", "ok", "FAILED", "skipped"


@dataclass
class StageResult:
    """What a stage found."""

    name: str
    status: str = NOT_BEGUN
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    """``what`` and ``why``"""
    failures: list[dict[str, str]] = field(default_factory=list)
    """``what``, ``error`` and ``traceback``"""
    notes: list[str] = field(default_factory=list)

    def add(self, item: Item, found: Outcome) -> None:
        self.rows += found.rows
        if found.skipped:
            self.skip(item.name, found.skipped)
        if found.error and item.required:
            self.fail(item.name, found.error, found.traceback)
        elif found.error:
            self.skip(item.name, found.error)

    def skip(self, what: str, why: str) -> None:
        self.skipped.append({"what": what, "why": why})

    def fail(self, what: str, error: str, traceback: str = "") -> None:
        self.failures.append({"what": what, "error": error, "traceback": traceback})

    def finish(self, seconds: float) -> None:
        self.seconds = seconds
        if self.failures or any(row.get("ok") is False for row in self.rows):
            self.status = FAILED
        else:
            self.status = SKIPPED if self.skipped and not self.rows else OK


@dataclass
class Results:
    """All of a run."""

    out: Path
    stages: dict[str, StageResult]
    minutes: float = 0.0
    device: str = "cuda"
    backends: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    tools: dict[str, str] = field(default_factory=dict)
    """Versions: driver, ptxas, nvcc, ..."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables that change what is compiled or run."""
    ceilings: dict[str, float] = field(default_factory=dict)
    """GB/s of a copy, and TFLOP/s by dtype."""
    states: list[dict[str, str]] = field(default_factory=list)
    """Of the GPU, before and after times: clocks, temperature, power."""
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    complete: bool = False
    ended_by: str = ""
    started: float = field(default_factory=time.monotonic)

    def rows(self, *names: str) -> Iterator[dict[str, Any]]:
        """The rows of these stages."""
        for name in names:
            if name in self.stages:
                yield from self.stages[name].rows

    @property
    def failed(self) -> bool:
        return any(stage.status == FAILED for stage in self.stages.values())

    def roofline_share(self, row: dict[str, Any]) -> float | None:
        """The least time that the flop and bytes of a row allow at these ceilings, over its time."""
        rate, bandwidth = self.ceilings.get(row["dtype"]), self.ceilings.get("copy")
        if rate is None or bandwidth is None:
            return None
        return 1e3 * max(row["flop"] / (rate * 1e12), row["bytes"] / (bandwidth * 1e9)) / row["ms"]

    def to_json(self) -> dict[str, Any]:
        content = {k: v for k, v in asdict(self).items() if k not in ("out", "started", "stages")}
        seconds = round(time.monotonic() - self.started, 1)
        head = {"version": VERSION, "command": sys.argv, "seconds": seconds}
        return head | content | {"stages": {name: asdict(stage) for name, stage in self.stages.items()}}

    @property
    def report(self) -> Path:
        return self.out.with_suffix(".md")

    @property
    def log(self) -> Path:
        """What the workers print."""
        return self.out.with_suffix(".log")


def new_results(out: Path, names: Sequence[str], not_run: Mapping[str, str], device: str, minutes: float) -> Results:
    """Empty; `not_run` says why some of the stages are not run."""
    stages = {name: StageResult(name, not_run.get(name, NOT_BEGUN)) for name in names}
    return Results(out, stages, minutes, device)
