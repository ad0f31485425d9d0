"""Items and stages of the tests, and a GPU that is only pretended."""

from __future__ import annotations

import stat
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu.items import Item
from benchmarks.gpu.processes import Outcome
from benchmarks.gpu.results import Results, StageResult, new_results
from benchmarks.gpu.session import Session
from benchmarks.gpu.stages import NAMES

CALLS = "tests.benchmarks.gpu.calls"


def item(function: str, limit: float = 60, fresh: bool = False, **arguments: Any) -> Item:
    return Item(f"{function} item", f"{CALLS}:{function}", arguments, limit=limit, fresh=fresh)


def executable(path: Path, script: str) -> Path:
    """A shell script in place of a tool."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def some_results(folder: Path, device: str = "cuda") -> Results:
    results = new_results(folder / "check.json", NAMES, {}, device, 8)
    results.backends = ["triton", "other"]
    return results


class RecordingSession(Session):
    """Runs nothing; keeps the items."""

    def __init__(self, results: Results) -> None:
        super().__init__(results, time.monotonic() + 1000)
        self.items: list[Item] = []
        self.prefixes: list[Sequence[str]] = []

    def run(self, stage: StageResult, items: Sequence[Item]) -> None:
        self.items += items

    def run_together(self, stage: StageResult, items: Sequence[Item]) -> None:
        self.items += items

    def run_under(self, prefix: Sequence[str], item: Item, judge: Any) -> Outcome:
        self.items.append(item)
        self.prefixes.append(prefix)
        return Outcome()


class _Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: _Event) -> float:
        return 1e3 * (other.at - self.at)


def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of torch.cuda happens on the CPU. A captured graph replays nothing."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "synchronize": lambda: None,
        "Event": _Event,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda chosen: nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": lambda graph: nullcontext(),
        "profiler": SimpleNamespace(start=lambda: None, stop=lambda: None),
        "get_device_capability": lambda device: (9, 0),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
