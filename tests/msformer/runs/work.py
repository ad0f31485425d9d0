"""What tests give to workers, in a module that they import fast: work on numbers, some of which goes wrong."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from msformer.runs.executors import Report

DIES_ONCE, DIES, FAILS = 2, 3, 4


def nothing(item: int, folder: Path, report: Report) -> None:
    pass


def dangerous(item: int, folder: Path, report: Report, *, traces: Path) -> int:
    """Writes two files, and is killed between them; returns the number of threads."""
    (folder / f"{item}.png").write_bytes(b"half")
    (traces / f"{item}-{time.monotonic_ns()}").touch()
    if item == DIES or (item == DIES_ONCE and len(list(traces.glob(f"{item}-*"))) == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if item == FAILS:
        raise FloatingPointError("the loss became nan")
    (folder / f"{item}.png").write_bytes(b"whole")
    (folder / f"{item}.json").write_text("{}")
    return torch.get_num_threads()


def lacking(item: int, folder: Path, report: Report) -> None:
    raise ModuleNotFoundError("No module named 'nibabel'", name="nibabel")


class Weights:
    """Leaves a trace whenever it is unpacked; returns the process that it is in."""

    def __init__(self, traces: Path) -> None:
        self.traces = traces

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        (self.traces / f"{os.getpid()}-{time.monotonic_ns()}").touch()

    def __call__(self, item: int, folder: Path, report: Report) -> int:
        return os.getpid()
