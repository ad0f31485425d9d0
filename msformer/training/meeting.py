"""How the processes of a training find each other: a name for one start of them all, that no earlier start had.

``torchrun`` keeps the store through which processes exchange their addresses when it starts them again. What the
processes before wrote is then still there, and one that reads the address of a dead process waits for it in vain. So
all agree on a new name first, below which they exchange what they have to. That takes three words, since any of them
may be an old one: each process says a word of its own, the first one says which words it heard, all of them confirm
that, and the first one says so.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

PAUSE = 0.02
"""Seconds between two looks."""


def meet(store: dist.Store, rank: int, count: int, patience: timedelta) -> str:
    """The name of this start of processes, the same in all of them.

    Args:
        store: which they share, and may have shared with processes that are gone.
        rank: of this process.
        count: of processes.
        patience: how long they wait for each other.

    Raises:
        ConnectionError: not all of them came.
    """
    mine = uuid.uuid4().hex
    store.set(f"hello/{rank}", mine)
    others = range(1, count)
    end = time.monotonic() + patience.total_seconds()
    while time.monotonic() < end:
        if rank == 0:
            heard = " ".join([mine, *(_word(store, f"hello/{other}") for other in others)])
            store.set("heard", heard)
            agreed = all(_word(store, f"confirmed/{other}") == heard for other in others)
            if agreed:
                store.set("agreed", heard)
        else:
            heard = _word(store, "heard")
            if mine in heard.split():
                store.set(f"confirmed/{rank}", heard)
            heard = _word(store, "agreed")
            agreed = mine in heard.split()
        if agreed:
            return hashlib.sha256(heard.encode()).hexdigest()[:16]
        time.sleep(PAUSE)
    raise ConnectionError(f"not all of {count} processes of the training have come within {patience}")


def _word(store: dist.Store, key: str) -> str:
    """What the store holds; "" if that is nothing."""
    return store.get(key).decode() if store.check([key]) else ""
