"""What `--cluster` costs beside the work: the start of Ray and of its workers, and a task that does next to nothing.

    python -m benchmarks.cluster_overhead
    python -m benchmarks.cluster_overhead --cluster HOST:PORT --tasks 2000

A task goes the whole way of an image: it is pickled and sent, gets a folder of its own, and what it leaves there is
returned and written by this process. Either it leaves nothing, or three files of 100 kB in all, as an image of
600 x 450 pixels does. Median and best of several rounds; beside it the same work without Ray. Then how many more tasks
a second all slots do than one, of tasks that only wait, which measures Ray, and of tasks that calculate, which measures
the machine as well.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from msformer.options import make_executor
from msformer.runs.executors import Executor, Local, Report

from .machine import describe

SIZES = {"labels.png": 10_000, "overlay.png": 88_000, "json": 2_000}
LONG = 0.3
"""Seconds of a task that is long."""


def nothing(item: int, folder: Path, report: Report) -> None:
    """Leaves no file."""


def three_files(item: int, folder: Path, report: Report) -> None:
    """Leaves files as large as those of an image."""
    for kind, size in SIZES.items():
        (folder / f"{item}.{kind}").write_bytes(bytes(size))


def waiting(item: int, folder: Path, report: Report) -> None:
    """Takes `LONG` and no CPU."""
    time.sleep(LONG)


def calculating(item: int, folder: Path, report: Report) -> None:
    """Takes `LONG` of CPU."""
    end = time.process_time() + LONG
    while time.process_time() < end:
        pass


def seconds(executor: Executor, work: Callable[[int, Path, Report], None], tasks: int) -> float:
    """Of all tasks together."""
    with TemporaryDirectory() as folder:
        started = time.perf_counter()
        for _, outcome in executor.run(work, range(tasks), Path(folder), lambda item: lambda *done: None):
            outcome.result()
        return time.perf_counter() - started


@click.command()
@click.option("--cluster", default="auto", show_default=True, help="As of msformer segment.")
@click.option("--tasks", default=200, show_default=True, type=click.IntRange(1))
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
@click.option("--long", "long_tasks", default=40, show_default=True, type=click.IntRange(1), help="Tasks of 0.3 s.")
def main(cluster: str, tasks: int, rounds: int, long_tasks: int) -> None:
    """Time tasks that do next to nothing."""
    machine = describe()
    click.echo(f"{machine.processor}, {machine.cores} cores")
    started = time.perf_counter()
    with make_executor(cluster, 1, "cpu", at_once=None, here=1) as executor:
        one = make_executor(cluster, 1, "cpu", at_once=1, here=1)  # of the same Ray
        click.echo(f"start: {time.perf_counter() - started:.1f} s")
        click.echo(f"first task: {seconds(executor, nothing, 1):.1f} s, with the imports of a worker")
        seconds(executor, nothing, tasks)
        for work in (nothing, three_files):
            for name, place in (("Ray", executor), ("here", Local(at_once=1))):
                times = [1000 * seconds(place, work, tasks) / tasks for _ in range(rounds)]
                median, best = statistics.median(times), min(times)
                click.echo(f"{work.__name__}, {name}: {median:.2f} ms a task of {tasks}, best {best:.2f} ms")
        for work in (waiting, calculating):
            alone, together = (long_tasks / seconds(place, work, long_tasks) for place in (one, executor))
            click.echo(
                f"{work.__name__}: {alone:.2f} tasks a second one at a time, {together:.2f} in all slots, "
                f"{together / alone:.2f} times as many"
            )


if __name__ == "__main__":
    main()
