"""Calls from many threads, with numbers of threads that change, and memory that does not grow."""

from __future__ import annotations

import os
import resource
import select
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module

import pytest
import torch
from torch import Tensor

from msformer_kernels.core.operator import OPERATORS
from tests.kernels.cases import Case, cast, require, run

Results = dict[str, Tensor]
DTYPES = (torch.float32, torch.bfloat16)


@cache
def _cases() -> dict[str, tuple[Case, torch.dtype]]:
    """A small and a large case of each operator, by name."""
    found = {}
    for operator in OPERATORS:
        cases = import_module(f"tests.kernels.cases.{operator}").CASES
        for i, case in enumerate((*cases.small[2:4], cases.large[0])):
            found[f"{operator} {case}"] = (case, DTYPES[i % 2])
    return found


def calls() -> list[str]:
    """The names of the calls."""
    return list(_cases())


@cache
def _inputs(name: str) -> dict[str, Tensor | None]:
    """The same for every thread: nobody writes to them."""
    case, dtype = _cases()[name]
    return cast(case.draw(), dtype)


def call(name: str) -> Results:
    """Outputs and gradients."""
    return run(_cases()[name][0], _inputs(name), "native")


def same(a: Results, b: Results) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def test_threads_that_change_their_number_have_the_bits_of_a_call_alone(threads: None) -> None:
    require("native")
    torch.set_num_threads(1)
    expected = {name: call(name) for name in calls()}

    def work(number: int) -> bool:
        name = calls()[number % len(calls())]
        torch.set_num_threads(1 + number % 5)
        return same(call(name), expected[name])

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(8 * len(calls()))))


def resident_kilobytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() // 1024


def growth(name: str, count: int) -> int:
    """By how many kilobytes the memory of the process is larger after `count` calls, a tenth of which come before."""
    for _ in range(count // 10):
        call(name)
    before = resident_kilobytes()
    for _ in range(count):
        call(name)
    return resident_kilobytes() - before


@pytest.mark.parametrize("operator", list(OPERATORS))
def test_memory_does_not_grow(operator: str) -> None:
    """1 KB a call would be seen; python -m tests.kernels.native.memory makes 10,000 calls of each kind."""
    require("native")
    try:
        found = growth(next(name for name in calls() if name.startswith(f"{operator} ")), 200)
    except FileNotFoundError:
        pytest.skip("there is no /proc")
    assert found < 200


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_of_a_process_that_has_used_threads(threads: None) -> None:
    """The kernels run on the thread that is left, where OpenMP would wait for those that are gone, and give the same
    bits. PyTorch's own loops wait: what a child does with them needs `torch.set_num_threads(1)`."""
    require("native")
    torch.set_num_threads(2)
    name = calls()[2]
    case, inputs = _cases()[name][0], _inputs(name)
    expected = case.call(inputs, "native")[0].detach()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        found = case.call(inputs, "native")[0].detach()
        os.write(writing, b"same" if torch.equal(found, expected) else b"other")
        os._exit(0)
    os.close(writing)
    try:
        ready, _, _ = select.select([reading], [], [], 60)
        assert ready, "the child hangs"
        assert os.read(reading, 10) == b"same"
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
