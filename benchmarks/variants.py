"""Rivals such as ``native (avx2)``: our kernels with a given variant of their CPU code, in one run with all the others.

The extension chooses its variant when it is imported, so each has a process of its own. There the candidate is made,
run and timed, with the caches flushed before each sample; only results and times come back.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from functools import lru_cache
from multiprocessing import get_context
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from .cases import Case
from .machine import cache_flusher, usable_variants
from .measure import conditions
from .rivals import backend_of, variant_of
from .workloads import Candidate, make_candidate

FOR_TESTS = ("emulated_tiles",)
Found = TypeVar("Found")


def in_variants(rivals: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    """The rivals with `native` in each of these variants; "all" are those of this machine, but none made for tests."""
    variants: dict[str, None] = {}
    for name in names:
        variants |= dict.fromkeys([name] if name != "all" else [v for v in usable_variants() if v not in FOR_TESTS])
    found: list[str] = []
    for rival in rivals:
        found += [f"native ({variant})" for variant in variants] if rival == "native" else [rival]
    return tuple(found)


def make_anywhere(case: Case, rival: str, keep_memory: bool) -> Candidate:
    """As `make_candidate`; a rival with a variant is in the process of that."""
    return Elsewhere(case, rival, keep_memory) if variant_of(rival) else make_candidate(case, rival)


class Elsewhere(Candidate):
    """A candidate in the process of its variant."""

    def __init__(self, case: Case, rival: str, keep_memory: bool) -> None:
        self.variant = variant_of(rival) or ""
        self.process = _process(self.variant)
        self.mode = self._there(_make, case, backend_of(rival), keep_memory, torch.get_num_threads())

    def run(self) -> None:
        self._there(_run)

    def results(self) -> dict[str, Tensor]:
        return {name: torch.from_numpy(value) for name, value in self._there(_results).items()}

    def clear(self) -> None:
        self._there(_clear)

    def sample(self, calls: int) -> float:
        return self._there(_sample, calls)

    def peak(self) -> int | None:
        return self._there(_peak)

    def _there(self, function: Callable[..., Found], *arguments: Any) -> Found:
        try:
            # the environment is that of the moment when the process is started, with the first call
            with mock.patch.dict(os.environ, MSFORMER_CPU_ISA=self.variant):
                return self.process.submit(function, *arguments).result()
        except BrokenProcessPool:
            _process.cache_clear()  # the next case gets a new one
            raise


@lru_cache
def _process(variant: str) -> ProcessPoolExecutor:
    # an interruption is for the command to handle
    return ProcessPoolExecutor(1, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN))


# in the process of a variant: what is measured there now, and the conditions for it
_candidate: Candidate
_conditions = ExitStack()
_flush = lru_cache(cache_flusher)


def _make(case: Case, rival: str, keep_memory: bool, threads: int) -> str:
    global _candidate
    _conditions.close()
    torch.set_num_threads(threads)
    _conditions.enter_context(conditions(case, keep_memory))
    _candidate = make_candidate(case, rival)
    return _candidate.mode


def _run() -> None:
    _candidate.run()


def _results() -> dict[str, np.ndarray]:
    return {name: value.double().numpy() for name, value in _candidate.results().items()}


def _clear() -> None:
    _candidate.clear()


def _sample(calls: int) -> float:
    _flush()()
    return _candidate.sample(calls)


def _peak() -> int | None:
    return _candidate.peak()
