"""Fixtures of the operator tests. A new backend joins all of them by its name in `COMPILED`."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

import pytest
import torch

from msformer_kernels.core.operator import OPERATORS
from msformer_kernels.native import arguments
from tests.kernels.cases import require

COMPILED = {"native": ("many_tokens", "few_tokens"), "cuda": (), "triton": ("folded",)}
"""Backends, and the forms of those that work on images of many and of few tokens in different ways."""
WITH_FORMS = ("efficient_self_attention", "mix_ffn")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend` is each of `COMPILED`; in a class of tests of one operator, each that serves it. `float64_backend` is
    for tests that need float64, or inputs too large for Triton's interpreter. Forms are told apart in the tests of
    operators that have them."""
    operator = getattr(metafunc.cls, "OPERATOR", None)
    of_operators = metafunc.module.__name__.startswith("tests.kernels.ops.")
    with_forms = operator in WITH_FORMS if operator else of_operators
    for fixture, names in (("backend", list(COMPILED)), ("float64_backend", ["native"])):
        if fixture in metafunc.fixturenames:
            served = [n for n in names if operator is None or n in OPERATORS[operator].served_by]
            metafunc.parametrize(fixture, [full for n in served for full in _forms(n, with_forms)], indirect=True)


def _forms(name: str, with_forms: bool) -> list[str]:
    return [f"{name}-{form}" for form in COMPILED[name]] if with_forms and COMPILED[name] else [name]


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A backend that is checked against the reference; skipped where it was not built."""
    yield from _prepared(request.param, monkeypatch)


@pytest.fixture(params=["cuda-unfolded", "triton-unfolded"])
def unfolded_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A GPU backend's other form of self-attention, for wide tokens."""
    yield from _prepared(request.param, monkeypatch)


@pytest.fixture
def float64_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """As `backend`, of those that compute in float64."""
    yield from _prepared(request.param, monkeypatch)


def _prepared(name_and_form: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name, _, form = name_and_form.partition("-")
    require(name)
    if name == "native" and form:
        monkeypatch.setattr(arguments, "FORM", getattr(arguments, form.upper()))
    elif name != "native":
        # as on a GPU, where no tokens are few, though the emulation runs on the CPU
        monkeypatch.setattr(arguments, "FORM", arguments.MANY_TOKENS)
        calls = import_module(f"msformer_kernels.ops.efficient_self_attention.{name}_calls")
        monkeypatch.setattr(calls, "MOST_FOLDED", 0 if form == "unfolded" else 128)
    if name == "triton":
        # in float32 the folded form has too many registers on a GPU, unless products are of tf32 (triton/test_tf32.py)
        monkeypatch.setattr(calls, "FOLDED_PRECISIONS", ("tf32", "tf32x3"))
    yield name


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory comes full of NaN, so that what a kernel does not write shows."""
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def fill(x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu" or not (x.is_floating_point() or x.dtype == torch.uint8):
            return x
        return x.fill_(float("nan") if x.is_floating_point() else 255)  # bytes, in which floats may lie

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size, **kw: fill(new_empty(self, *size, **kw)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kw: fill(empty_like(*args, **kw)))


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
