"""Hands the cases of `OperatorTests.CASES` to the tests, by the names of their arguments."""

from __future__ import annotations

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = getattr(metafunc.cls, "CASES", None)
    if cases is None:
        return
    chosen = {
        "small": cases.small,
        "smooth": [
            *(c for c in cases.small if not any(n in c.name for n in ("relu", "hardswish", "expanded"))),
            *(c for c in cases.large if c.name in ("memory", "rms_norm")),
        ],
        "special": [c for c in cases.small if c.name in ("cross", "scaling", "heads", "bare", "relu", "tanh", "small")],
        "tiled": (*cases.small, *cases.medium),
        "large": cases.large,
        "any_native": (*cases.small, *cases.large, *cases.empty),
        "empty": cases.empty,
    }
    for name in chosen.keys() & set(metafunc.fixturenames):
        metafunc.parametrize(name, chosen[name], ids=str)
