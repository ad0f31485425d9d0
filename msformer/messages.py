"""What a command tells: lines for people, and with ``--json`` events for programs.

Lines go to standard output, warnings and errors to standard error. With ``--json`` standard output holds events alone,
a JSON object on each line, and every line for people goes to standard error. With ``--quiet`` only errors are printed.
docs/command-line.md describes the events.
"""

from __future__ import annotations

import json as json_format
import math
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any, TextIO

from msformer.text import ascii_json, visible, visible_lines

if TYPE_CHECKING:
    from rich.console import Console

PROGRESS_EVERY = 1.0
"""Seconds between two events of progress of one item."""


@dataclass
class _Manner:
    """How the running command tells what it has to tell."""

    quiet: bool = False
    json: bool = False
    last: dict[str, Any] = field(default_factory=dict)
    """What the last event will say."""
    told: dict[str, float] = field(default_factory=dict)
    """When the last event of progress of an item was."""


_manner = _Manner()
_lock = threading.Lock()


def speaks() -> bool:
    """Whether this process, of those that ``torchrun`` started if it did, prints what all have to say."""
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


@contextmanager
def telling(quiet: bool = False, json: bool = False) -> Iterator[None]:
    """How things are told within the block, in all threads; by default to people."""
    global _manner
    before, _manner = _manner, _Manner(quiet, json and speaks())
    try:
        yield
    finally:
        _manner = before


def say(text: str) -> None:
    """Prints a line in which nothing that came from outside does anything to the terminal."""
    if not _manner.quiet:
        _print(visible(text), sys.stderr if _manner.json else sys.stdout)


def show(text: str, event: str, **facts: Any) -> None:
    """Prints what was asked for, as it is, or its event; whatever the manner."""
    if _manner.json:
        tell(event, **facts)
    else:
        _print(text, sys.stdout)


def note(text: str) -> None:
    """As `say`, but never among the results: on standard error."""
    if not _manner.quiet:
        _print(visible(text), sys.stderr)


def warn(text: str) -> None:
    """Something of the whole run that the user should know."""
    note(f"warning: {text}")
    tell("warning", message=text)


def complain(text: str) -> None:
    """Prints a line about what went wrong, whatever the manner."""
    _print(visible(text), sys.stderr)


def console(**options: Any) -> Console:
    """For tables and bars; it has colours and moves only on a terminal. `options` are those of rich."""
    from rich.console import Console

    return Console(stderr=_manner.json, quiet=_manner.quiet, **options)


def is_heard() -> bool:
    """Whether a program listens to events."""
    return _manner.json


def tell(event: str, **facts: Any) -> None:
    """An event, if a program listens. Paths and characters that are no Unicode become text, NaN becomes null."""
    if _manner.json:
        line = json_format.dumps(_plain({"event": event, **facts}), ensure_ascii=False, allow_nan=False)
        with _lock:
            _print(ascii_json(line), sys.stdout)


def tell_progress(item: str, done: int, total: int, details: str) -> None:
    """An event of progress, if the last one of this item is not of the same moment."""
    now = time.monotonic()
    if _manner.json and now - _manner.told.get(item, -math.inf) >= PROGRESS_EVERY:
        _manner.told[item] = now
        tell("progress", name=item, done=done, total=total, details=details)


def tell_at_end(**facts: Any) -> None:
    """Facts for the last event of the command, which says how it ended."""
    _manner.last.update(facts)


def tell_the_end(command: str, exit_code: int, status: str) -> None:
    """The last event."""
    tell("end", command=command, status=status, exit_code=exit_code, **_manner.last)


def _plain(value: Any) -> Any:
    """What JSON has a form for."""
    if hasattr(value, "item"):  # of a number of numpy or pandas
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, PathLike) else value


def _print(line: str, file: TextIO) -> None:
    print(line, file=file, flush=True)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Warnings of this package for its users are lines without a place in the source, safe for a terminal, each once;
    with ``--json`` they are events as well, and with ``--quiet`` no lines."""

    def shown(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = str(message)
        if category is not UserWarning:
            text = visible_lines(warnings.formatwarning(message, category, filename, lineno, line).rstrip())
        elif text in said:  # Python forgets what it has shown when a library changes the filters
            return
        else:
            said.add(text)
            tell("warning", message=text)
            text = f"warning: {visible(text)}"
        if not _manner.quiet:
            _print(text, file or sys.stderr)

    before, said = warnings.showwarning, set[str]()
    warnings.showwarning = shown
    try:
        yield
    finally:
        warnings.showwarning = before
