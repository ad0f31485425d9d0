"""Results as text: the tables of the console and of the Markdown report share their columns."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.cases import MODELS
from benchmarks.machine import Ceilings, Machine
from benchmarks.rivals import PLAIN
from benchmarks.rows import MEASURED, Row, gain


def duration(seconds: float) -> str:
    """Three digits, with a unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1 or unit == "µs":
            value = seconds * factor
            return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"
    raise AssertionError


def size(count: float) -> str:
    return f"{count / 2**20:.0f} MiB" if count >= 10 * 2**20 else f"{count / 2**20:.1f} MiB"


def title(row: Row) -> str:
    passes = "" if row.operation in MODELS else ", forward" if row.passes == "forward" else ", forward + backward"
    return f"{row.operation} {row.shape}, {row.dtype}{passes}"


def columns(rivals: Sequence[str]) -> list[str]:
    gains = [f"over {rival}" for rival in rivals]
    tail = ["of ceiling", "GF/s", "peak memory", "error", "over eager's"]
    return ["rival", "computes in", "time", "spread", *gains, *tail]


def cells(row: Row, group: Sequence[Row], rivals: Sequence[str]) -> list[str]:
    """One row, in the columns of `columns`; empty where there is nothing to say."""
    seconds, spread = row.seconds, row.spread
    if row.status != MEASURED or seconds is None:
        return [row.rival, row.mode, row.status, *[""] * (6 + len(rivals))]
    by_name = {other.rival: other for other in group}
    gains = [gain(row, by_name[rival]) if rival in by_name and rival != row.rival else None for rival in rivals]
    return [
        row.rival,
        row.mode,
        duration(seconds),
        "" if spread is None else f"{spread / seconds:.0%}",
        *("" if factor is None else f"{factor:.2f} x" for factor in gains),
        "" if row.share_of_ceiling is None else f"{row.share_of_ceiling:.0%}",
        f"{row.flop / seconds / 1e9:.0f}",
        "" if row.peak_memory is None else size(row.peak_memory),
        "" if row.error is None else f"{row.error:.1e}",
        _share_of_error(row, by_name.get("eager")),
    ]


def _share_of_error(row: Row, eager: Row | None) -> str:
    """How the error compares with that of eager PyTorch."""
    if row.error is None or eager is None or not eager.error or row is eager:
        return ""
    return f"{row.error / eager.error:.2f} x"


BUSY = 0.1
"""Cores taken by other programs, from which on times are called into question."""


def problems(group: Sequence[Row]) -> list[str]:
    """What was not timed, and why; and whether the machine was busy with other things."""
    found = [f"{row.rival} is not timed: {row.reason}" for row in group if row.status != MEASURED]
    busy = group[0].other_programs
    if busy is not None and busy >= BUSY:
        found.append(f"other programs kept {busy:.1f} cores busy meanwhile: do not rely on these times")
    return found


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The rivals that there are, the plain forms first."""
    names = list(dict.fromkeys(row.rival for row in rows))
    return [name for name in PLAIN if name in names] + [name for name in names if name not in PLAIN]


def machine_lines(machine: Machine, ceilings: Ceilings, rounds: int, keep_memory: bool) -> list[str]:
    """Where this was measured, and what that machine can do."""
    return [
        f"{machine.processor}, {machine.cores} logical cores, {machine.memory / 2**30:.0f} GiB; {machine.system}",
        f"Python {machine.python}, torch {machine.torch}, msformer {machine.msformer}; backends "
        f"{', '.join(machine.backends)}; instruction set {machine.instruction_set}",
        f"{machine.threads} threads, at most {rounds} rounds; {machine.date}; between fitting steps freed memory "
        f"{'stays with the process, for every rival' if keep_memory else 'goes back to the system, for every rival'}",
        f"ceilings: {ceilings.flop_per_second / 1e9:.0f} GF/s ({ceilings.flop_source}), "
        f"{ceilings.bytes_per_second / 1e9:.1f} GB/s ({ceilings.bytes_source})",
    ]


LEGEND = (
    "Times are medians of interleaved rounds, with the caches flushed before each sample; the spread is the distance "
    "between the quartiles. 'over X' is the time of X divided by that of the row: above 1, the row is faster. GF/s "
    "count the products of the folded form, whatever a rival does. 'of ceiling' is the least time that flop and bytes "
    "allow on this machine, by the ceilings measured in the same run (float32 multiply-adds, also for bfloat16), "
    "divided by the time. Peak memory is what a call adds. The error is the worst of all results and gradients, "
    "against float64, and after it, the same divided by that of eager PyTorch. Nothing is timed whose error is above "
    "what benchmarks/correctness.py allows."
)
