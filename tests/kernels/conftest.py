"""Fixtures of the operator tests. A new backend joins all of them by its name in `COMPILED`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.cases import require

COMPILED = ["native-many_tokens", "native-few_tokens"]


@pytest.fixture(params=COMPILED)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend that is checked against the reference; skipped where it was not built.

    The native kernels work on images of many and of few tokens in different ways; every test is for both.
    """
    name, _, form = request.param.partition("-")
    require(name)
    from msformer_kernels import _native

    _native.set_form(form)
    yield name
    _native.set_form("by_shape")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory comes full of NaN, so that what a kernel does not write shows."""
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def fill(x: torch.Tensor) -> torch.Tensor:
        return x.fill_(float("nan")) if x.is_floating_point() and x.device.type == "cpu" else x

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size, **kw: fill(new_empty(self, *size, **kw)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kw: fill(empty_like(*args, **kw)))


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def isa() -> Iterator[None]:
    """Puts the instruction set back."""
    native = pytest.importorskip("msformer_kernels._native")
    before = native.isa()
    yield
    native.set_isa(before)
