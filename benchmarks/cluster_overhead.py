"""What `--cluster` costs beside the work: the start of Ray and of its workers, and a task that does next to nothing.

    python -m benchmarks.cluster_overhead
    python -m benchmarks.cluster_overhead --cluster HOST:PORT --tasks 2000

A task goes the whole way of an image: it is pickled and sent, gets a folder of its own, and what it leaves there is
returned and written by this process. Either it leaves nothing, or three files of 100 kB in all, as an image of
600 x 450 pixels does. Median and best of several rounds; beside it the same work without Ray.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from benchmarks.machine import describe
from msformer.options import make_executor
from msformer.runs.executors import Executor, Local, Report

SIZES = {"labels.png": 10_000, "overlay.png": 88_000, "json": 2_000}


def nothing(item: int, folder: Path, report: Report) -> None:
    """Leaves no file."""


def three_files(item: int, folder: Path, report: Report) -> None:
    """Leaves files as large as those of an image."""
    for kind, size in SIZES.items():
        (folder / f"{item}.{kind}").write_bytes(bytes(size))


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
def main(cluster: str, tasks: int, rounds: int) -> None:
    """Time tasks that do next to nothing."""
    machine = describe()
    click.echo(f"{machine.processor}, {machine.cores} cores")
    started = time.perf_counter()
    with make_executor(cluster, 1, "cpu", at_once=None, here=1) as executor:
        click.echo(f"start: {time.perf_counter() - started:.1f} s")
        click.echo(f"first task: {seconds(executor, nothing, 1):.1f} s, with the imports of a worker")
        seconds(executor, nothing, tasks)
        for work in (nothing, three_files):
            for name, place in (("Ray", executor), ("here", Local(at_once=1))):
                times = [1000 * seconds(place, work, tasks) / tasks for _ in range(rounds)]
                median, best = statistics.median(times), min(times)
                click.echo(f"{work.__name__}, {name}: {median:.2f} ms a task of {tasks}, best {best:.2f} ms")


if __name__ == "__main__":
    main()
