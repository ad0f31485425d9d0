"""Processes that find each other, also where others met before."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from msformer.training.meeting import meet

dist = pytest.importorskip("torch.distributed")
SOON = timedelta(seconds=20)


def test_a_name_for_each_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes first, and whatever is left of those before; one of the starts loses a process halfway."""
    monkeypatch.setattr("msformer.training.meeting.PAUSE", 0.001)
    store, lock, names = dist.HashStore(), threading.Lock(), set()
    chance = random.Random(0)

    class Locked:
        """One that several threads may use."""

        def __getattr__(self, name: str):
            def call(*arguments: object) -> object:
                with lock:
                    return getattr(store, name)(*arguments)

            return call

    def come(rank: int, delay: float) -> str:
        time.sleep(delay)
        return meet(Locked(), rank, 3, SOON)  # type: ignore[arg-type]

    for start in range(12):
        if start % 4 == 3:  # a start of which two come, and are killed while they wait
            for rank in chance.sample(range(3), 2):
                with pytest.raises(ConnectionError, match="not all of 3 processes"):
                    meet(Locked(), rank, 3, timedelta(seconds=0.01))  # type: ignore[arg-type]
        with ThreadPoolExecutor(3) as pool:
            found = set(pool.map(come, range(3), [chance.uniform(0, 0.02) for _ in range(3)]))
        assert len(found) == 1
        names |= found
    assert len(names) == 12
