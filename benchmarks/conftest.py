"""Hands the cases and their rivals to bench_rivals.py."""

from __future__ import annotations

import pytest

from .cases import QUICK_CASES, full_cases, quick_rivals
from .rivals import all_rivals


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the whole grid instead of the quick selection")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if not {"case", "rival"} <= set(metafunc.fixturenames):
        return
    if metafunc.config.getoption("--full"):
        plan = [(case, all_rivals()) for case in full_cases()]
    else:
        plan = [(case, quick_rivals(case, all_rivals())) for case in QUICK_CASES]
    chosen = [(case, rival) for case, rivals in plan for rival in rivals]
    names = [f"{case}-{rival}".replace(" ", "-") for case, rival in chosen]
    metafunc.parametrize(("case", "rival"), chosen, ids=names)
