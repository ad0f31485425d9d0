"""Items that measure: what the GPU can do at most, and the times of our backends and of their rivals."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import msformer_kernels as kernels

from ..rivals import STORAGE, plain_attention, plain_block, plain_mix_ffn
from .cases import GpuCase, set_tf32
from .checks import captured, random_tokens
from .items import Skip

FLUSHED = 512 * 2**20
"""Bytes that are written before each run, more than any second-level cache holds."""
LEAST_RUNS, MOST_RUNS = 20, 1000
HOST_CALLS = 200


def sample_ms(run: Callable[[], Any], device: str, seconds: float = 0.3) -> list[float]:
    """Times of many runs by events of the device, the second-level cache flushed before each."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(5):
        run()
    torch.cuda.synchronize()
    one = (time.perf_counter() - started) / 5
    runs = max(LEAST_RUNS, min(MOST_RUNS, round(seconds / max(one, 1e-6))))
    flush = torch.empty(FLUSHED // 4, dtype=torch.int32, device=device)
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(runs)] for _ in range(2))
    for start, end in zip(starts, ends, strict=True):
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]


def describe(device: str) -> dict[str, Any]:
    """The GPU and what drives it."""
    from ..machine import describe_gpu

    return describe_gpu(torch.device(device))


def copy_ceiling(device: str) -> dict[str, Any]:
    """Reads and writes of a copy of 1 GiB."""
    source = torch.randn(1 << 28, device=device)
    target = torch.empty_like(source)
    ms = statistics.median(sample_ms(lambda: target.copy_(source), device))
    return {"ceiling": "copy", "value": 2 * source.nbytes / ms / 1e6, "unit": "GB/s"}


def product_ceiling(dtype: str, device: str) -> dict[str, Any]:
    """A product of 8192 x 8192 matrices."""
    set_tf32(dtype)
    a, b = (torch.randn(8192, 8192, device=device).to(STORAGE[dtype]) for _ in range(2))
    ms = statistics.median(sample_ms(partial(torch.matmul, a, b), device))
    return {"ceiling": dtype, "value": 2 * 8192**3 / ms / 1e9, "unit": "TFLOP/s"}


def _plain(case: GpuCase, layer: Any, x: Tensor) -> Tensor:
    """The operation as one would write it in PyTorch for speed, on the parameters of our layer."""
    height, width = case.shape.height, case.shape.width
    if case.operation == "attention":
        return plain_attention(layer["attention"], layer["norm"], x)
    if case.operation == "mix_ffn_skip":
        return plain_mix_ffn(layer["mix_ffn"], layer["norm"], x, height, width)
    return plain_block(layer, x, height, width)


def training_step(case: GpuCase, backend: str | None, compile_mode: str | None, device: str) -> Callable[[], Any]:
    """Forward and backward: of our layer on a backend, or of the plain form, compiled if a mode is given."""
    layer = case.layer().to(device, case.storage)
    x = random_tokens(case, 0, device).requires_grad_()
    grad = torch.randn_like(x)
    inputs = [x, *layer.parameters()]

    def ours(x: Tensor) -> Tensor:
        with kernels.use_backend(str(backend)):
            return case.run(layer, x)[0]

    def plain(x: Tensor) -> Tensor:
        return _plain(case, layer, x)

    forward = ours if backend else plain if compile_mode is None else torch.compile(plain, mode=compile_mode)

    def run() -> Any:
        if compile_mode == "max-autotune":
            torch.compiler.cudagraph_mark_step_begin()
        return torch.autograd.grad(forward(x), inputs, grad, allow_unused=True)

    return run


def measure(
    case: dict[str, Any], contender: str, backend: str | None, compile_mode: str | None, graphed: bool, device: str
) -> dict[str, Any]:
    """The time of forward and backward of one contender; `graphed` takes the host out of it."""
    what = GpuCase.from_json(case)
    missing = what.check_backend(backend) if backend else []
    set_tf32(what.dtype)
    run = training_step(what, backend, compile_mode, device)
    started = time.perf_counter()
    try:
        run()
    except kernels.BackendError as reason:
        raise Skip(str(reason)) from reason
    torch.cuda.synchronize()
    first = time.perf_counter() - started
    samples = sorted(sample_ms(captured(run)[0].replay if graphed else run, device))
    work = what.work()
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    row: dict[str, Any] = {"case": str(what), "contender": contender, "backend": backend or "", "dtype": what.dtype}
    row |= {"ms": median, "low": low, "high": high, "runs": len(samples), "first call s": round(first, 1)}
    return row | {"flop": work.flop, "bytes": work.bytes, "on another backend": missing}


def host_time(operation: str, backend: str, device: str) -> dict[str, Any]:
    """Host time of a forward call: many calls on few tokens, without waiting for the device."""
    from ..cases import Shape

    case = GpuCase(operation, Shape(1, 4, 4, 32), "bfloat16", "forward")
    case.check_backend(backend)
    layer = case.layer().to(device, case.storage)
    x = random_tokens(case, 0, device)
    with torch.no_grad(), kernels.use_backend(backend):
        for _ in range(HOST_CALLS // 10):
            case.run(layer, x)
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(HOST_CALLS):
            case.run(layer, x)
        seconds = (time.perf_counter() - started) / HOST_CALLS
    torch.cuda.synchronize()
    return {"operation": operation, "backend": backend, "us": seconds * 1e6}


def profiled(case: dict[str, Any], backend: str, device: str) -> dict[str, Any]:
    """One warm training step between the marks that Nsight Compute looks for."""
    what = GpuCase.from_json(case)
    what.check_backend(backend)
    set_tf32(what.dtype)
    run = training_step(what, backend, None, device)
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    run()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    work = what.work()
    return {"case": str(what), "backend": backend, "dtype": what.dtype, "bytes": work.bytes, "flop": work.flop}
