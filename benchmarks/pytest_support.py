"""What the bench files share: which cases, and the check before the timing.

Here a rival is timed after the other, as pytest-benchmark does it; `python -m benchmarks` lets them take turns, and is
the one to quote.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.cases import QUICK_CASES, Case, full_cases, quick_rivals
from benchmarks.machine import cache_flusher
from benchmarks.measure import checked, exact_results
from benchmarks.models import make_candidate
from benchmarks.rivals import all_rivals
from benchmarks.rows import new_row

ROUNDS = 5


def cases_of(operations: Sequence[str], full: bool) -> list[tuple[Case, str]]:
    """The cases of some operations, with each of their rivals."""
    if full:
        plan = [(case, all_rivals()) for case in full_cases()]
    else:
        plan = [(case, quick_rivals(case, all_rivals())) for case in QUICK_CASES]
    return [(case, rival) for case, rivals in plan if case.operation in operations for rival in rivals]


@lru_cache(maxsize=1)
def _exact(case: Case) -> tuple[str, dict[str, Tensor]]:
    return exact_results(case, make_candidate)


def bench(benchmark: BenchmarkFixture, case: Case, rival: str) -> None:
    """Times a rival if its results are right; the test fails if they are not."""
    torch.compiler.reset()
    row = new_row(case, rival)
    row.exact, exact = _exact(case)
    candidate = checked(case, rival, row, exact, make_candidate)
    if candidate is None:
        pytest.fail(f"{rival} is not timed: {row.reason}")
    benchmark.group = str(case)
    benchmark.extra_info.update({"rival": rival, "mode": row.mode, "error": row.error, "flop": row.flop})
    flush = cache_flusher()

    def cold() -> None:
        candidate.clear()
        flush()

    benchmark.pedantic(candidate.run, setup=cold, rounds=ROUNDS, warmup_rounds=1)
