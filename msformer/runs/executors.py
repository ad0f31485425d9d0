"""Where the items of a run are worked on: in this process, or elsewhere.

An executor calls a function for items, several at a time, and gives back each item with its outcome as they end. The
function writes its files below a folder, a record last; on a cluster that is a folder of the worker, and the executor
carries the files over. Nobody but this process writes to the folder of the run.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")
Report = Callable[..., None]
"""Called as ``report(done, steps)`` or ``report(done, steps, details)``."""
Work = Callable[[Item, Path, Report], Value]
"""Called as ``work(item, folder, report)``. It may be called from several threads, and where it is called in other
processes, it and the items can be pickled."""


class Interrupted(Exception):
    """The run is over, because another item or Ctrl-C ended it."""


class Executor(ABC):
    """A context manager: what it needs is there within the block."""

    def __enter__(self) -> Executor:
        return self

    def __exit__(  # noqa: B027 there is nothing to leave where nothing was entered
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    @property
    def facts(self) -> dict[str, Any]:
        """What a summary should say of where the run took place; plain JSON."""
        return {}

    @abstractmethod
    def run(
        self, work: Work[Item, Value], items: Iterable[Item], folder: Path, start: Callable[[Item], Report]
    ) -> Generator[tuple[Item, Future[Value]], None, None]:
        """Calls ``work(item, folder, report)`` for all items.

        Args:
            work: what it raises is in the outcome and ends nothing.
            items: taken one by one, in this thread, when there is room for another.
            folder: where the files of the work end up.
            start: returns the report of an item, where there is one to see it.

        Yields:
            Each item with its outcome, a finished future, in the order in which they end. When the generator is closed,
            so are the items that it still works on; files that are complete stay.
        """


class Local(Executor):
    """In this process, `at_once` items in threads at a time; a single one in the thread of the caller."""

    def __init__(self, at_once: int) -> None:
        self.at_once = at_once

    def run(
        self, work: Work[Item, Value], items: Iterable[Item], folder: Path, start: Callable[[Item], Report]
    ) -> Generator[tuple[Item, Future[Value]], None, None]:
        if self.at_once == 1:
            for item in items:
                yield item, _called(work, item, folder, start(item))
            return
        over = threading.Event()

        def stoppable(report: Report) -> Report:
            def stop_or_report(*arguments: Any) -> None:
                if over.is_set():
                    raise Interrupted
                report(*arguments)

            return stop_or_report

        left = iter(items)
        running: dict[Future[Value], Item] = {}
        with ThreadPoolExecutor(self.at_once) as pool:
            try:
                while True:
                    for item in islice(left, self.at_once - len(running)):
                        running[pool.submit(work, item, folder, stoppable(start(item)))] = item
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        yield running.pop(future), future
            finally:
                over.set()


def _called(work: Work[Item, Value], item: Item, folder: Path, report: Report) -> Future[Value]:
    future: Future[Value] = Future()
    try:
        future.set_result(work(item, folder, report))
    except Exception as error:
        future.set_exception(error)
    return future
