"""A row of the results: one rival in one case."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .cases import Case
from .rivals import type_name

MEASURED, WRONG, FAILED = "measured", "wrong", "failed"
Key = tuple[str, str, str, str, str]


@dataclass
class Row:
    """What was found; times are seconds a call."""

    operation: str
    shape: str
    dtype: str
    passes: str
    rival: str
    family: str
    tokens: int
    flop: float
    """Of the folded form, whatever the rival does."""
    bytes: float
    """That must move at the least."""
    precision: str = "highest"
    """Of float32 products, as `Case.precision`."""
    mode: str = ""
    status: str = FAILED
    reason: str = ""
    """Why there is no time."""
    error: float | None = None
    error_where: str = ""
    exact: str = ""
    """What the results were compared with."""
    calls: int = 1
    """In a sample."""
    samples: list[float] = field(default_factory=list)
    peak_memory: int | None = None
    share_of_ceiling: float | None = None
    other_programs: float | None = None
    """Cores that were busy with something else while the case was timed."""

    @property
    def key(self) -> Key:
        return self.operation, self.shape, self.type, self.passes, self.rival

    @property
    def type(self) -> str:
        return type_name(self.dtype, self.precision)

    @property
    def seconds(self) -> float | None:
        """The median; None if nothing was timed."""
        return statistics.median(self.samples) if self.samples else None

    @property
    def spread(self) -> float | None:
        """The distance between the quartiles; None with fewer than three samples."""
        if len(self.samples) < 3:
            return None
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return high - low

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"seconds": self.seconds, "spread": self.spread}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Row:
        known = {item.name for item in fields(cls)}
        return cls(**{name: value for name, value in content.items() if name in known})


def new_row(case: Case, rival: str) -> Row:
    work = case.work()
    return Row(
        operation=case.operation,
        shape=str(case.shape),
        dtype=case.dtype,
        passes=case.passes,
        rival=rival,
        family=case.family,
        tokens=case.shape.tokens,
        flop=work.flop,
        bytes=work.bytes,
        precision=case.precision,
    )


def groups(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each case."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(row.key[:4], []).append(row)
    return list(found.values())


def gain(row: Row, over: Row) -> float | None:
    """How many times the time of `row` is that of `over`: above 1, `row` is faster."""
    if row.seconds is None or over.seconds is None:
        return None
    return over.seconds / row.seconds


def is_within_spread(row: Row, other: Row) -> bool:
    """Whether two times differ by no more than their spreads together; False where these are not known."""
    if row.seconds is None or other.seconds is None or row.spread is None or other.spread is None:
        return False
    return abs(row.seconds - other.seconds) <= row.spread + other.spread
