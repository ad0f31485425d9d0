"""Runs items: against the clock, each in a worker, the results saved after every one."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from .items import Item
from .processes import Outcome, Tool, Worker
from .report import line, save
from .results import Results, StageResult

NO_TIME = "no time left"
LEAST_LIMIT = 5.0
MOST_PARTS = 16
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""For work that has none for more: Triton's interpreter, compilation in many processes."""


class Session:
    """The clock and the processes of a run."""

    def __init__(self, results: Results, deadline: float) -> None:
        self.results, self.deadline = results, deadline
        self.reserved = 0.0
        """Seconds that are kept for later stages."""
        self._shared: Worker | None = None
        self._running: set[Worker | Tool] = set()
        self._lock, self._closed = threading.Lock(), False
        results.log.unlink(missing_ok=True)

    @property
    def device(self) -> str:
        return self.results.device

    def left(self) -> float:
        """Seconds that the current stage may still use."""
        return self.deadline - time.monotonic() - self.reserved

    def run(self, stage: StageResult, items: Sequence[Item]) -> None:
        """One after the other."""
        for item in items:
            if self._may_begin(stage, item):
                found = self._run_fresh(item) if item.fresh else self._run_shared(item)
                self.record(stage, item, found)

    def run_together(self, stage: StageResult, items: Sequence[Item]) -> None:
        """All at the same time, each in a process of its own."""
        chosen = [item for item in items if self._may_begin(stage, item)]
        if not chosen:
            return
        pool = ThreadPoolExecutor(len(chosen))
        try:
            futures = {pool.submit(self._run_fresh, item): item for item in chosen}
            for future in as_completed(futures):
                self.record(stage, futures[future], future.result())
        finally:
            if any(not future.done() for future in futures):
                self.close()  # so that the threads come to an end
            pool.shutdown(wait=True, cancel_futures=True)

    def run_under(
        self, prefix: Sequence[str], item: Item, judge: Callable[[int | None, str, Outcome], Outcome]
    ) -> Outcome:
        """An item under a tool; `judge` makes an outcome of exit code, output and that of the item."""
        tool = self._started(lambda: Tool(prefix, item))
        try:
            return judge(*tool.run(self._limit(item)))
        finally:
            self._ended(tool)

    def close(self) -> None:
        """Ends every process."""
        with self._lock:
            running, self._running, self._shared, self._closed = self._running, set(), None, True
        for process in running:
            process.close()

    def _may_begin(self, stage: StageResult, item: Item) -> bool:
        if self.left() >= item.seconds:
            return True
        stage.skip(item.name, NO_TIME)
        print(f"skipped {item.name}: {NO_TIME}", flush=True)
        return False

    def _limit(self, item: Item) -> float:
        return max(LEAST_LIMIT, min(item.limit, self.deadline - time.monotonic()))

    def _run_shared(self, item: Item) -> Outcome:
        if self._shared is None or not self._shared.is_running:
            if self._shared is not None:
                self._ended(self._shared)
            self._shared = self._started(lambda: Worker(self.results.log, ONE_THREAD if self.device == "cpu" else {}))
        return self._shared.run(item, self._limit(item))

    def _run_fresh(self, item: Item) -> Outcome:
        worker = self._started(lambda: Worker(self.results.log, item.environment))
        try:
            return worker.run(item, self._limit(item))
        finally:
            self._ended(worker)

    def _started(self, start: Callable[[], Any]) -> Any:
        with self._lock:
            if self._closed:
                raise RuntimeError("the run is being ended")
            process = start()
            self._running.add(process)
        return process

    def _ended(self, process: Worker | Tool) -> None:
        process.close()
        with self._lock:
            self._running.discard(process)

    def record(self, stage: StageResult, item: Item, found: Outcome) -> None:
        stage.add(item, found)
        for row in found.rows:
            self._print(stage, row)
        if found.skipped:
            print(f"skipped {item.name}: {found.skipped}", flush=True)
        if found.error:
            print(f"{'FAILED' if item.required else 'skipped'} {item.name}: {found.error}", flush=True)
        save(self.results)

    def _print(self, stage: StageResult, row: dict[str, Any]) -> None:
        try:
            text = line(stage.name, row)
        except Exception as error:  # a row of an unexpected form must not cost the next items
            text = f"{row} ({error!r})"
        if text:
            print(text, flush=True)


def cores() -> int:
    """How many processes may compile at the same time."""
    return max(1, min(MOST_PARTS, len(os.sched_getaffinity(0))))
