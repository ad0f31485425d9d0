"""What changed between two runs."""

from __future__ import annotations

from dataclasses import dataclass, fields

from rich.console import Console
from rich.table import Table

from .report import Results
from .rows import Key, Row
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
        difference = self.new.seconds - self.old.seconds
        if abs(difference) <= self.old.spread + self.new.spread:
            return SAME
        return SLOWER if difference > 0 else FASTER


@dataclass(frozen=True)
class Comparison:
    """Two runs, row by row."""

    changes: list[Change]
    only_old: list[Key]
    only_new: list[Key]
    machine: list[str]
    """What is different about the machine, versions and threads."""


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
    )


def print_comparison(console: Console, comparison: Comparison) -> None:
    for line in comparison.machine:
        console.print(f"not the same machine or versions: {line}", markup=False, soft_wrap=True)
    table = Table()
    for name in ("operation", "shape", "type", "passes", "rival"):
        table.add_column(name)
    for name in ("old", "new", "new / old"):
        table.add_column(name, justify="right")
    table.add_column("")
    for change in comparison.changes:
        times = [row.status if row.seconds is None else duration(row.seconds) for row in (change.old, change.new)]
        ratio = "" if change.ratio is None else f"{change.ratio:.3f}"
        table.add_row(*change.old.key, *times, ratio, change.verdict)
    console.print(table)
    for where, keys in (("first", comparison.only_old), ("second", comparison.only_new)):
        for key in keys:
            console.print(f"only in the {where} file: {' '.join(key)}", markup=False, soft_wrap=True)
