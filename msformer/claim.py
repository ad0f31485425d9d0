"""One run at a time in a folder of results.

A run holds a lock on a file in its folder. The system lets go of it when the process ends, however it ends, and all
containers of a machine see it. Other machines may not, so the run also touches the file every few seconds: who finds
the mark of another machine there watches it, and goes on when nothing happened for longer than that. Times are those of
the disk; clocks of machines, and process ids, are not compared.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from msformer.messages import note
from msformer.output import OutputError, is_open_as, locked, machine, make_folder, remove_leftovers, writing

LOCK = ".msformer-lock"
BEAT = 5.0
"""Seconds between two signs of life."""
SILENCE = 30.0
"""Seconds without one, after which a run on another machine is over."""
_LOOK = 1.0


class FolderInUse(OutputError):
    """Another run writes to the folder; the message says which."""


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Prepares a folder of results, which is this run's alone within the block.

    Raises:
        FolderInUse: another run writes there.
        OutputError: it cannot be made or written to.
    """
    now = make_folder(folder)
    path = folder / LOCK
    with writing(path):
        handle = _open_alone(folder)
    over = threading.Event()
    beating = threading.Thread(target=_beat, args=(handle, path, over), daemon=True)
    try:
        beating.start()
        remove_leftovers(folder, now)
        yield
    finally:
        over.set()
        if beating.is_alive():
            beating.join()
        with suppress(OSError):
            if is_open_as(handle, path):  # not that of a run which found this one silent for long
                path.unlink()
        os.close(handle)


def _open_alone(folder: Path) -> int:
    """The lock file, open, locked where the file system can, with the mark of this run in it."""
    path = folder / LOCK
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            lock = locked(handle)
            if lock is False:
                raise FolderInUse(_in_use(folder, _read(handle)))
            if is_open_as(handle, path):  # otherwise its run ended, and removed it, since it was opened
                holder = _read(handle)
                if holder is not None and not (lock and holder.get("machine") == machine()):
                    _wait_for_silence(folder, holder)
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps(_mark()).encode(), 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _mark() -> dict[str, Any]:
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"machine": machine(), "host": socket.gethostname(), "process": os.getpid(), "since": now}


def _read(handle: int) -> dict[str, Any] | None:
    """The mark in a lock file; None where there is none."""
    content = os.pread(handle, 4096, 0)
    if not content:
        return None
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


def _in_use(folder: Path, holder: dict[str, Any] | None) -> str:
    known = holder or {}
    who = (
        f", process {known['process']} on {known['host']} since {known['since']},"
        if known.keys() >= _mark().keys()
        else ""
    )
    return f"{folder}: another run{who} writes there; wait until it is over, or take another folder with --out"


def _wait_for_silence(folder: Path, holder: dict[str, Any]) -> None:
    """Returns when the run on another machine gave no sign of life for `SILENCE` seconds; raises FolderInUse when it
    gives one."""
    path = folder / LOCK
    last = _changed(path)
    silent = make_folder(folder) - last
    if silent < SILENCE:
        host = holder.get("host", "another machine")
        note(f"a run on {host} wrote to {folder} {max(silent, 0):.0f} s ago; waiting for a sign of life")
    until = time.monotonic() + SILENCE - max(silent, 0)
    while time.monotonic() < until:
        time.sleep(_LOOK)
        if _changed(path) != last:
            raise FolderInUse(_in_use(folder, holder))


def _changed(path: Path) -> float:
    """When a file was last touched. It is opened, since that makes network file systems ask their server."""
    handle = os.open(path, os.O_RDONLY)
    try:
        return os.fstat(handle).st_mtime
    finally:
        os.close(handle)


def _beat(handle: int, path: Path, over: threading.Event) -> None:
    while not over.wait(BEAT):
        with suppress(OSError):
            os.utime(handle if os.utime in os.supports_fd else path)
