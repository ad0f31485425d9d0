"""Worker processes, seen from the command: started, asked, and ended when they take too long."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .items import Item

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT = 120.0
"""Seconds for importing torch, which takes a minute from a slow disk."""


@dataclass(frozen=True)
class Outcome:
    """What became of an item."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: str = ""
    error: str = ""
    traceback: str = ""
    seconds: float = 0.0


def worker_environment(more: Mapping[str, str]) -> dict[str, str]:
    """The variables of a worker, which finds the packages where this process found them."""
    # installed, as msformer.benchmarks, they are where Python looks
    roots = [str(ROOT), str(ROOT / "kernels")] if __package__ == "benchmarks.gpu" else []
    paths = [path for path in roots if path == str(ROOT) or path in sys.path]
    given = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": os.pathsep.join([*paths, *([given] if given else [])])} | dict(more)


def end(process: subprocess.Popen[Any]) -> None:
    """Ends a process that has a session of its own, and all that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)


class Worker:
    """One process, and what it was asked. What it prints goes to `log`."""

    def __init__(self, log: Path, environment: Mapping[str, str] | None = None) -> None:
        self._replies, descriptor = os.pipe()
        self._buffer = b""
        self._ready = False
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.worker", str(descriptor)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=(descriptor,),
                env=worker_environment(environment or {}),
                start_new_session=True,
            )
        os.close(descriptor)

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def run(self, item: Item, limit: float) -> Outcome:
        """What becomes of the item; after an error that the process does not outlive it has ended."""
        started = time.monotonic()
        try:
            if not self._ready:
                self._reply(START_LIMIT)
                self._ready = True
                started = time.monotonic()
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps({"call": item.call, "arguments": item.arguments}).encode() + b"\n")
            self.process.stdin.flush()
            reply = self._reply(limit)
        except TimeoutError:
            self.close()
            return Outcome(error=f"not finished within {limit:.0f} s", seconds=time.monotonic() - started)
        except (EOFError, OSError):
            self.close()
            return Outcome(error=f"the process {_ending(self.process)}", seconds=time.monotonic() - started)
        if reply.get("broken"):
            self.close()
        return outcome(reply, time.monotonic() - started)

    def close(self) -> None:
        end(self.process)
        with suppress(OSError):
            os.close(self._replies)
            self._replies = -1
        if self.process.stdin is not None:
            with suppress(OSError):
                self.process.stdin.close()

    def _reply(self, limit: float) -> dict[str, Any]:
        """Raises TimeoutError after `limit` seconds, EOFError when the process ended."""
        until = time.monotonic() + limit
        while b"\n" not in self._buffer:
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError
            ended = not self.is_running
            if select.select([self._replies], [], [], min(left, 1.0))[0]:
                data = os.read(self._replies, 1 << 16)
                if not data:
                    raise EOFError
                self._buffer += data
            elif ended:  # something that it started may still hold the pipe
                raise EOFError
        line, _, self._buffer = self._buffer.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found


def outcome(reply: Mapping[str, Any], seconds: float) -> Outcome:
    return Outcome(
        reply.get("rows", []),
        reply.get("skipped", ""),
        reply.get("error", ""),
        reply.get("traceback", ""),
        seconds,
    )


def _ending(process: subprocess.Popen[Any]) -> str:
    code = process.poll()
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    return f"was ended by {signal.Signals(-code).name}"


class Tool:
    """An item under a tool such as compute-sanitizer: `prefix` is the tool and its options."""

    def __init__(self, prefix: Sequence[str], item: Item) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="gpu-check-")
        request, self._reply = Path(self.folder.name) / "request.json", Path(self.folder.name) / "reply.json"
        self._output = Path(self.folder.name) / "output.txt"
        request.write_text(json.dumps({"call": item.call, "arguments": item.arguments}))
        command = [*prefix, sys.executable, "-m", f"{__package__}.worker", "--once", str(request), str(self._reply)]
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=worker_environment(item.environment),
                start_new_session=True,
            )

    def run(self, limit: float) -> tuple[int | None, str, Outcome]:
        """Exit code (None: not finished within `limit` seconds), all that was printed, what became of the item."""
        started = time.monotonic()
        try:
            code: int | None = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        end(self.process)
        seconds = time.monotonic() - started
        try:
            found = outcome(json.loads(self._reply.read_text()), seconds)
        except (OSError, ValueError):
            found = Outcome(error="the item did not come to an end", seconds=seconds)
        text = self._output.read_text(errors="replace")
        self.folder.cleanup()
        return code, text, found

    def close(self) -> None:
        end(self.process)
