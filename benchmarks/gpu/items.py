"""What a worker process is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


class Skip(Exception):
    """Raised by an item that cannot run here; the message says why."""


@dataclass(frozen=True)
class Item:
    """A call of a function that returns rows: one dictionary, or a list of them, of what JSON can hold."""

    name: str
    call: str
    """``.module:function``, of a module of this package."""
    arguments: dict[str, Any]
    seconds: float = 1
    """What it takes; it is not begun with less time left."""
    limit: float = 90
    """Seconds after which its process is ended."""
    fresh: bool = False
    """Whether it gets a process of its own."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of that process, besides those of this one."""
    required: bool = True
    """Whether its error is one of the check; that of a rival is not."""
