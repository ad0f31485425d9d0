"""What changed between two runs: `--compare OLD NEW`."""

from __future__ import annotations

from dataclasses import dataclass, fields

from .documents import Document, Table
from .plots import Plot, change_plot, plot
from .records import Results
from .report import BUSY, title, where_lines
from .rows import Key, Row, is_within_spread
from .tables import duration

FASTER, SLOWER, SAME, UNKNOWN = "faster", "SLOWER", "", "too few samples"


@dataclass(frozen=True)
class Change:
    """A row of both runs."""

    old: Row
    new: Row

    @property
    def ratio(self) -> float | None:
        """New time over old time."""
        if self.old.seconds is None or self.new.seconds is None:
            return None
        return self.new.seconds / self.old.seconds

    @property
    def verdict(self) -> str:
        """A change counts if it is larger than the spreads of both runs together."""
        if self.old.seconds is None or self.new.seconds is None:
            return SAME if self.old.status == self.new.status else f"{self.old.status} -> {self.new.status}"
        if self.old.spread is None or self.new.spread is None:
            return UNKNOWN
        if is_within_spread(self.old, self.new):
            return SAME
        return SLOWER if self.new.seconds > self.old.seconds else FASTER


@dataclass(frozen=True)
class Comparison:
    """Two runs, row by row."""

    changes: list[Change]
    only_old: list[Key]
    only_new: list[Key]
    machine: list[str]
    """What is different about the machine, versions and threads."""
    where: list[str]
    """Where both were measured."""


def compare(old: Results, new: Results) -> Comparison:
    before, after = {row.key: row for row in old.rows}, {row.key: row for row in new.rows}
    ignored = {"date"}
    different = [
        f"{item.name}: {getattr(old.machine, item.name)} -> {getattr(new.machine, item.name)}"
        for item in fields(old.machine)
        if item.name not in ignored and getattr(old.machine, item.name) != getattr(new.machine, item.name)
    ]
    return Comparison(
        changes=[Change(row, after[key]) for key, row in before.items() if key in after],
        only_old=[key for key in before if key not in after],
        only_new=[key for key in after if key not in before],
        machine=different,
        where=[
            f"{name}: {line}"
            for name, results in (("old", old), ("new", new))
            for line in (*where_lines(results.machine), f"{results.machine.threads} threads, {results.machine.date}")
        ],
    )


LEGEND = (
    ("new / old", "the new time divided by the old one: below 1, the new run is faster"),
    (
        "verdict",
        f"{FASTER} or {SLOWER} if the medians differ by more than the spreads of both runs together, the distances "
        "between the quartiles of their samples; otherwise nothing is said to have changed",
    ),
)


def document(comparison: Comparison) -> Document:
    header = ["case", "rival", "old\ntime a call", "new\ntime a call", "new / old", "verdict"]
    notes = [
        f"only in the {where} file: {' '.join(key)}"
        for where, keys in (("first", comparison.only_old), ("second", comparison.only_new))
        for key in keys
    ]
    rows = [row for change in comparison.changes for row in (change.old, change.new)]
    busy = max((row.other_programs or 0 for row in rows), default=0)
    if busy >= BUSY:
        notes.append(f"other programs kept up to {busy:.1f} cores busy meanwhile: do not rely on these times")
    if not comparison.changes:
        notes.append("the files have no row in common")
    return Document(
        title="Benchmarks, compared",
        facts=comparison.where,
        warnings=[f"Not the same machine or versions: {line}" for line in comparison.machine],
        tables=[Table("What changed", header, [_cells(change) for change in comparison.changes], 2, notes)],
        legend=LEGEND,
        plots=_plots(comparison),
    )


def _cells(change: Change) -> list[str]:
    times = [row.status if row.seconds is None else duration(row.seconds) for row in (change.old, change.new)]
    ratio = "" if change.ratio is None else f"{change.ratio:.3f}"
    return [title(change.old), change.old.rival, *times, ratio, change.verdict]


def _plots(comparison: Comparison) -> list[Plot]:
    ratios = {
        f"{title(change.old)}, {change.old.rival}": change.ratio
        for change in comparison.changes
        if change.ratio is not None
    }
    if not ratios:
        return []
    slower, faster = (sum(change.verdict == kind for change in comparison.changes) for kind in (SLOWER, FASTER))
    alt = f"New time over old time of {len(ratios)} rows: {faster} are faster, {slower} slower, the rest neither"
    return [plot("comparison", alt, change_plot(ratios))]
