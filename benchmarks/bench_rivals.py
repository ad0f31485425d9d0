"""pytest-benchmark: `pytest benchmarks` times the cases of `python -m benchmarks`, quick or `--full`, rival by rival.

Here a rival is timed after the other, as pytest-benchmark does it; `python -m benchmarks` lets them take turns, and is
the one to quote. `-k attention` and the like choose an operation.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from .cases import Case
from .machine import cache_flusher
from .measure import checked, exact_results
from .rows import new_row
from .workloads import make_candidate

ROUNDS = 5


@lru_cache(maxsize=1)
def _exact(case: Case) -> tuple[str, dict[str, Tensor]]:
    return exact_results(case, make_candidate)


def test_rival(benchmark: BenchmarkFixture, case: Case, rival: str) -> None:
    """Times a rival if its results are right; fails if they are not."""
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
