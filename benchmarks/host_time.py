"""The time of a call of each operator for so few tokens that it is the host's.

    python -m benchmarks.host_time                        native kernels, beside eager PyTorch
    python -m benchmarks.host_time --backend triton       Triton kernels; no GPU is needed
    MSFORMER_CUDA_EMULATE=1 python -m benchmarks.host_time --backend cuda     CUDA kernels; no GPU is needed

A native call is whole: checks of the arguments, dispatch, allocation, and the kernel on 1 or 16 tokens; with and
without its backward. Of a call on a GPU everything happens but the launches, in whose place a stub answers; for Triton
also the choice of tiles and its own way to a compiled kernel. The launch path is what the backend does of such a call.
Forward only, without gradients. One thread, backends in turns, median of several rounds.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

import click
import torch
from torch import Tensor

from .ahead_of_time import recorded_launches
from .cuda_launches import INSTEAD, recorded
from .machine import describe

Call = Callable[[], Tensor]


def calls(dim: int, dtype: torch.dtype) -> dict[str, Call]:
    """A call of each operator, by name; all inputs and parameters need gradients."""
    import msformer_kernels as kernels

    block = kernels.EfficientTransformerBlock(dim).to(dtype)
    linear = kernels.TokenLinear(dim, dim).to(dtype)
    one = torch.randn(1, 1, dim, dtype=dtype, requires_grad=True)
    x = torch.randn(1, 16, dim, dtype=dtype, requires_grad=True)
    q = torch.randn(1, 1, 16, dim, dtype=dtype, requires_grad=True)
    return {
        "linear": lambda: linear(one),
        "efficient_self_attention": lambda: block.attn(x, norm=block.norm1, residual=True)[0],
        "mix_ffn": lambda: block.mlp(x, 4, 4, norm=block.norm2, residual=True),
        "efficient_attention": lambda: kernels.efficient_attention(q, q, q)[0],
        "batch_norm": lambda: kernels.batch_norm(x)[0],
    }


def _with_backward(call: Call) -> Call:
    def both() -> Tensor:
        output = call()
        output.backward(torch.ones_like(output))
        return output

    return both


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def compare(call: Callable[[], Any], backends: list[str], repeats: int, rounds: int) -> list[float]:
    """Seconds a call with each of the backends, which take turns."""
    import msformer_kernels as kernels

    found: dict[str, list[float]] = {name: [] for name in backends}
    for _ in range(rounds + 1):  # the first is for warming up
        for name in backends:
            with kernels.use_backend(name):
                found[name].append(_seconds(call, repeats))
    return [statistics.median(times[1:]) for times in found.values()]


def measure_native(dim: int = 32, repeats: int = 300, rounds: int = 9) -> list[tuple[str, list[float]]]:
    """(what, seconds with the native kernels and in eager PyTorch)"""
    rows = []
    for name, call in calls(dim, torch.float32).items():
        with torch.no_grad():
            rows.append((name, compare(call, ["native", "reference"], repeats, rounds)))
        rows.append((f"{name} + backward", compare(_with_backward(call), ["native", "reference"], repeats, rounds)))
    return rows


@contextmanager
def stub_of_triton(target: str = "sm_90") -> Iterator[None]:
    """Within it Triton's kernels are compiled, and not launched."""
    from msformer_kernels.core import backends

    with recorded_launches(target), mock.patch.object(backends, "_interpreted", True):
        yield


@contextmanager
def stub_of_cuda() -> Iterator[None]:
    """Within it the emulation of the CUDA kernels does not run them."""
    with recorded(INSTEAD):
        yield


STUBS = {"triton": stub_of_triton, "cuda": stub_of_cuda}


def launch_path(call: Call, operator: str, backend: str) -> Callable[[], Any]:
    """What a backend does of a call, from the op's kernel on."""
    from msformer_kernels.core.backends import MODULES

    module = import_module(f"msformer_kernels.ops.{operator}.{MODULES[backend]}")
    forward, seen = module.forward, []

    def record(values: Any) -> Any:
        seen.append(values)
        return forward(values)

    with mock.patch.object(module, "forward", record):
        call()
    return lambda: forward(seen[0])


def measure_launches(
    backend: str, dim: int = 32, repeats: int = 300, rounds: int = 9
) -> list[tuple[str, float, float]]:
    """(operator, seconds of a call, seconds of its launch path) with the kernels of a GPU backend"""
    import msformer_kernels as kernels
    from msformer_kernels.core.operator import OPERATORS

    rows = []
    with STUBS[backend](), torch.no_grad(), kernels.use_backend(backend):
        for name, call in calls(dim, torch.bfloat16).items():
            if backend in OPERATORS[name].served_by:
                whole = compare(call, [backend], repeats, rounds)[0]
                rows.append((name, whole, compare(launch_path(call, name, backend), [backend], repeats, rounds)[0]))
    return rows


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--backend", type=click.Choice(["native", *STUBS]), default="native", show_default=True)
@click.option("--dim", default=32, show_default=True, help="Channels.")
def main(backend: str, dim: int) -> None:
    """Measures the time of a call of each operator on few tokens: checks, dispatch, allocation, launch."""
    from msformer_kernels import available_backends, explain

    torch.set_num_threads(1)
    if backend == "native":
        click.echo(f"{describe().processor}, 1 thread, torch {torch.__version__}; us a call\n{'':<36} native  eager")
        for name, (ours, eager) in measure_native(dim):
            click.echo(f"{name:<36} {ours * 1e6:6.1f} {eager * 1e6:6.1f}")
        return
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        raise click.ClickException("TRITON_INTERPRET=1 replaces what is measured; unset it")
    if backend == "cuda" and backend not in available_backends():
        raise click.ClickException(explain().reasons[backend])
    click.echo(f"{describe().processor}, 1 thread, torch {torch.__version__}; us a call\n{'':<26} whole  launch path")
    for name, whole, path in measure_launches(backend, dim):
        click.echo(f"{name:<26} {whole * 1e6:5.0f}  {path * 1e6:5.0f}")


if __name__ == "__main__":
    main()
