"""`pytest benchmarks`: the cases of `python -m benchmarks`, quick or `--full`, each rival a test of its own."""

from __future__ import annotations

import pytest

from benchmarks.pytest_support import cases_of


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the whole grid instead of the quick selection")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A file names its operations in ``OPERATIONS``."""
    if {"case", "rival"} <= set(metafunc.fixturenames):
        chosen = cases_of(metafunc.module.OPERATIONS, full=metafunc.config.getoption("--full"))
        metafunc.parametrize(
            ("case", "rival"), chosen, ids=[f"{case}-{rival}".replace(" ", "-") for case, rival in chosen]
        )
