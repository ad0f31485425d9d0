"""The report of a run: its tables and plots, and its files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .cases import EXPECTED, MODELS
from .documents import Document, Table, write_document
from .machine import Ceilings, Machine
from .plots import draw_plots
from .records import Results, write_json_file
from .rivals import PLAIN, is_ours, variant_of
from .rows import MEASURED, Row, gain, groups, is_within_spread
from .tables import duration

NAME = "report"


def size(count: float) -> str:
    return f"{count / 2**20:.0f} MiB" if count >= 10 * 2**20 else f"{count / 2**20:.1f} MiB"


def title(row: Row) -> str:
    passes = "" if row.operation in MODELS else ", forward" if row.passes == "forward" else ", forward + backward"
    return f"{row.operation} {row.shape}, {row.type}{passes}"


def columns(rivals: Sequence[str]) -> list[str]:
    tail = ["share of\nceiling", "GF/s", "memory\nadded", "largest\nerror", "error, times\neager's"]
    return ["rival", "computes in", "time\na call", "spread", *map(_as_fast, rivals), *tail]


def _as_fast(rival: str) -> str:
    return f"times as fast\nas {rival}"


def cells(row: Row, group: Sequence[Row], rivals: Sequence[str]) -> list[str]:
    """One row, in the columns of `columns`; empty where there is nothing to say."""
    seconds, spread = row.seconds, row.spread
    if row.status != MEASURED or seconds is None:
        return [row.rival, row.mode, row.status, *[""] * (6 + len(rivals))]
    by_name = {other.rival: other for other in group}
    return [
        row.rival,
        row.mode,
        duration(seconds),
        "" if spread is None else f"{spread / seconds:.0%}",
        *(_gain_cell(row, by_name.get(rival)) for rival in rivals),
        share_cell(row),
        _digits(row.flop / seconds / 1e9),
        "" if row.peak_memory is None else size(row.peak_memory),
        "" if row.error is None else f"{row.error:.1e}",
        _share_of_error(row, by_name.get("eager")),
    ]


def _gain_cell(row: Row, other: Row | None) -> str:
    factor = None if other is None or other is row else gain(row, other)
    if other is None or factor is None:
        return ""
    return f"{'~' if is_within_spread(row, other) else ''}{factor:.2f} x"


def share_cell(row: Row) -> str:
    """Of the ceiling."""
    return "" if row.share_of_ceiling is None else f"{_digits(100 * row.share_of_ceiling)}%"


def _digits(value: float) -> str:
    """Two digits, more if the number is larger."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


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
    """What others are compared with: the plain forms first; of several variants of the kernels, the first."""
    names = list(dict.fromkeys(row.rival for row in rows))
    others = [name for name in names if variant_of(name)][1:]
    names = [name for name in names if name not in others]
    return [name for name in PLAIN if name in names] + [name for name in names if name not in PLAIN]


def where_lines(machine: Machine) -> list[str]:
    """The machine, and the versions of what ran on it."""
    return [
        f"{machine.processor}, {machine.cores} logical cores, {machine.memory / 2**30:.0f} GiB; {machine.system}",
        f"Python {machine.python}, torch {machine.torch}, msformer {machine.msformer}; backends "
        f"{', '.join(machine.backends)}; instruction set {machine.instruction_set}",
    ]


def machine_lines(machine: Machine, ceilings: Ceilings, rounds: int, keep_memory: bool) -> list[str]:
    """Where this was measured, and what that machine can do."""
    rates = [(ceilings.flop_per_second, ceilings.flop_source)]
    rates += [(rate, source) for rate, source in ceilings.bfloat16_rates() if rate]
    return [
        *where_lines(machine),
        f"{machine.threads} threads, at most {rounds} rounds; {machine.date}; between fitting steps freed memory "
        f"{'stays with the process, for every rival' if keep_memory else 'goes back to the system, for every rival'}",
        f"ceilings: {', '.join(f'{rate / 1e9:.0f} GF/s ({source})' for rate, source in rates)}, "
        f"{ceilings.bytes_per_second / 1e9:.1f} GB/s ({ceilings.bytes_source})",
    ]


LEGEND = (
    (
        "heading",
        f"the operation; the shape, {EXPECTED.partition(',')[0]}, h attention heads, and m the width of the hidden "
        "layer if it is not 4 x DIM; the type, with float32 as torch.set_float32_matmul_precision, the same for every "
        "rival; forward alone or with all gradients",
    ),
    (
        "rival",
        "published: the structure of the published code; eager: the same layers written well in plain PyTorch; "
        "compile: torch.compile of eager, in its default mode; native and the like: the kernels of msformer. All have "
        "the same weights and inputs",
    ),
    (
        "time a call",
        "the median of samples, for which the rivals take turns; before each sample the caches are flushed",
    ),
    ("spread", "the distance between the quartiles of the samples, as a share of the time"),
    (
        "times as fast as X",
        "the time of X divided by that of the row: above 1, the row is faster. With ~ before it the two times differ "
        "by less than their spreads together, which may be chance. Of several variants of the kernels, X is the first",
    ),
    (
        "share of ceiling",
        "the least time that flop and bytes allow on this machine, by the rates measured before and after the run, "
        "divided by the time. Flop of float32 'highest' are multiply-adds; our kernels can exceed these with AMX, so "
        "above 100 % is possible. Of bfloat16 and 'medium' the rate is the best of AMX tiles, AVX-512 BF16 and "
        "multiply-adds that the variant of the kernels has, for other rivals that the machine has. Of 'high' it is a "
        "third of the tiles for our kernels with AMX, else multiply-adds",
    ),
    ("GF/s", "10^9 flop a second, counting the products of the folded form, whatever a rival does"),
    ("memory added", "what a call adds to the memory of the process at its peak"),
    (
        "largest error",
        "the worst of all results and gradients, relative, against float64; then the same divided by that of eager. "
        "Nothing is timed whose error is above the bound of its type",
    ),
)


def case_table(group: Sequence[Row], rivals: Sequence[str] | None = None) -> Table:
    """The rivals of one case, compared with `rivals`: those of the case, if None."""
    names = columns_of(group) if rivals is None else rivals
    return Table(title(group[0]), columns(names), [cells(row, group, names) for row in group], 2, problems(group))


def summary(rows: Sequence[Row]) -> Table:
    """Each case in a line: our kernels beside the others."""
    names = columns_of(rows)
    others = [name for name in names if not is_ours(name)]
    lines = []
    for group in groups(rows):
        by_name = {row.rival: row for row in group}
        for row in group:
            if row.rival in names and is_ours(row.rival) and row.seconds is not None:
                gains = [_gain_cell(row, by_name.get(name)) for name in others]
                lines.append([title(row), row.rival, duration(row.seconds), *gains, share_cell(row)])
    header = ["case", "kernels", "time\na call", *map(_as_fast, others), "share of\nceiling"]
    return Table("Summary: the kernels of msformer beside the others", header, lines, 2)


def document(results: Results) -> Document:
    """All but the plots."""
    rivals = columns_of(results.rows)
    found = summary(results.rows)
    return Document(
        title="Benchmarks",
        facts=head_lines(results),
        warnings=[] if results.complete else ["Interrupted: some cases are missing."],
        legend=LEGEND,
        tables=[*([found] if found.rows else []), *(case_table(group, rivals) for group in groups(results.rows))],
    )


def head_lines(results: Results) -> list[str]:
    """The machine and the settings, and what is left out."""
    lines = machine_lines(results.machine, results.ceilings, results.rounds, results.keep_memory)
    return lines + [f"not run: {line}" for line in results.left_out]


def write_results(folder: Path, results: Results) -> list[Path]:
    """Writes all files; returns their paths, the JSON first."""
    written = write_json_file(folder, results)
    drawn = replace(document(results), plots=draw_plots(results.rows, results.ceilings))
    return [written, *write_document(folder, NAME, drawn)]
