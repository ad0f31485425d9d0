"""The CPU kernels beside other code that uses the same registers and tiles, in the same threads and processes: oneDNN's
bfloat16 products, kernels of torch.compile, threads that start and end, forked and spawned workers."""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import msformer_kernels as kernels
from tests.kernels.cases import require

DTYPES = (torch.float32, torch.bfloat16)


def ours(dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Outputs and gradients of an operator, in one row; weights are large enough for every engine."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    x = random(1, 24 * 20, 64)
    weights = [random(256, 64), random(256), random(256, 1, 3, 3), random(256), random(64, 256)]
    found = kernels.mix_ffn(x, 24, 20, *weights, None, backend="native")
    gradients = torch.autograd.grad(found.sum(), [x, *weights])
    return torch.cat([found.detach().flatten(), *(g.flatten() for g in gradients)])


@pytest.fixture(autouse=True)
def native() -> None:
    require("native")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_onednn_between_ours(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(192, 160).bfloat16(), torch.randn(70, 192).bfloat16()
    expected, theirs = ours(dtype), linear(x)
    for _ in range(5):
        assert torch.equal(ours(dtype), expected)
        assert torch.equal(linear(x), theirs)


@pytest.mark.slow(6)
def test_compiled_code_between_ours() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(96, 64).bfloat16().requires_grad_(False), torch.randn(70, 96).bfloat16()
    compiled = torch.compile(lambda y: torch.nn.functional.gelu(linear(y)))
    theirs = compiled(x)
    for dtype in DTYPES:
        expected = ours(dtype)
        for _ in range(3):
            assert torch.equal(ours(dtype), expected)
            assert torch.equal(compiled(x), theirs)


def test_many_threads() -> None:
    """More than there are cores, each with kernels and products of its own."""
    torch.manual_seed(0)
    linear, x = nn.Linear(192, 160).bfloat16(), torch.randn(70, 192).bfloat16()
    theirs = linear(x).detach()
    expected = {(dtype, seed): ours(dtype, seed) for dtype in DTYPES for seed in range(4)}

    def work(number: int) -> bool:
        key = (DTYPES[number % 2], number % 4)
        return torch.equal(ours(*key), expected[key]) and torch.equal(linear(x).detach(), theirs)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(32)))


@pytest.mark.slow(6)
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers(method: str) -> None:
    """A forked worker has one thread: OpenMP's do not outlive a fork, as PyTorch says of its own."""
    if method == "fork" and sys.platform != "linux":
        pytest.skip("no fork here")
    if method == "fork":
        before = torch.get_num_threads()
        torch.set_num_threads(1)
    try:
        expected = [ours(dtype, 1) for dtype in DTYPES]
        with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as pool:
            found = list(pool.map(_in_a_worker, DTYPES, timeout=120))
    finally:
        if method == "fork":
            torch.set_num_threads(before)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def _in_a_worker(dtype: torch.dtype) -> Tensor:
    torch.set_num_threads(1)
    return ours(dtype, 1)
