"""``msformer train`` that is killed, as nothing else can be.

``dying.py RANK STEP ARGUMENTS…``, for ``torchrun`` or alone: the process of this rank dies before that step, unless
``torchrun`` started it again. `killed_at_each_write` is for a process of its own.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which takes a second, and every training imports

import msformer.training.run
from msformer.cli import main
from msformer.training.batches import Batches
from msformer.training.distributed import started_again

msformer.training.run.CHECKPOINT_EVERY = 10

_replace, _write, _make = os.replace, Path.write_bytes, Batches.make


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_step(step: int) -> None:
    def made(self: Batches, number: int) -> Any:
        if number == step:
            die()
        return _make(self, number)

    Batches.make = made  # type: ignore[method-assign]


def die_at_rename(number: int) -> None:
    """When a whole file is about to get its name."""
    left = iter(range(number, -1, -1))

    def replaced(*names: Any) -> None:
        if next(left) == 0:
            die()
        _replace(*names)

    os.replace = replaced


def die_at_write(number: int) -> None:
    """When half of a file is written."""
    left = iter(range(number, -1, -1))

    def written(self: Path, content: Any) -> int:
        if next(left) == 0:
            _write(self, bytes(content)[: len(content) // 2])
            die()
        return _write(self, content)

    Path.write_bytes = written  # type: ignore[method-assign]


def in_child(arguments: list[str], prepare: Callable[[], None] = lambda: None) -> int:
    """The exit status of the command in a process of its own, which shares what was imported; minus a signal."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    try:
        prepare()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        main(["train", *arguments])
    except SystemExit as ended:
        os._exit(int(ended.code or 0))
    finally:
        os._exit(99)


def killed_at_each_write(folder: Path, every: int, arguments: list[str]) -> Iterator[str]:
    """Trains in ``folder/whole``, then for one of `every` points in ``folder/…``, twice: killed there, and again."""
    assert in_child([*arguments, "--out", str(folder / "whole")]) == 0
    some = range(0, 99, every)
    for kind, points in ((die_at_step, range(4, 99, 11)), (die_at_rename, some), (die_at_write, some)):
        for point in points:
            name = f"{kind.__name__}-{point}"
            command = [*arguments, "--out", str(folder / name)]
            killed = in_child(command, lambda kind=kind, point=point: kind(point))  # type: ignore[misc]
            if killed == 0:
                break
            assert killed == -signal.SIGKILL
            assert in_child(command) == 0
            yield name


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "each":
        for name in killed_at_each_write(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]):
            print(name, flush=True)
    else:
        if os.environ.get("RANK", "0") == sys.argv[1] and not started_again():
            die_at_step(int(sys.argv[2]))
        main(["train", *sys.argv[3:]])
