"""The time of a call of each operator for so few tokens that it is the host's.

    python -m benchmarks.host_time                        native kernels, beside eager PyTorch
    python -m benchmarks.host_time --backend triton       Triton kernels; no GPU is needed

A native call is whole: checks of the arguments, dispatch, allocation, and the kernel on 1 or 16 tokens; with and
without its backward. Of a Triton call everything happens but the launch by the driver: also the choice of tiles and
Triton's own way to a compiled kernel; forward only. One thread, backends in turns, median of several rounds.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from unittest import mock

import click
import torch
from torch import Tensor

from benchmarks.ahead_of_time import recorded_launches
from benchmarks.machine import describe

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


def _seconds(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def compare(call: Call, backends: list[str], repeats: int, rounds: int) -> list[float]:
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


def measure_triton(
    target: str = "sm_90", dim: int = 32, repeats: int = 300, rounds: int = 9
) -> list[tuple[str, float]]:
    """(operator, seconds with the Triton kernels)"""
    from msformer_kernels.core import backends

    rows = []
    with ExitStack() as stack:
        stack.enter_context(recorded_launches(target))
        stack.enter_context(mock.patch.object(backends, "_interpreted", True))
        stack.enter_context(torch.no_grad())
        for name, call in calls(dim, torch.bfloat16).items():
            if name != "linear":  # Triton has no kernels for it
                rows.append((name, compare(call, ["triton"], repeats, rounds)[0]))
    return rows


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--backend", type=click.Choice(["native", "triton"]), default="native", show_default=True)
@click.option("--dim", default=32, show_default=True, help="Channels.")
def main(backend: str, dim: int) -> None:
    """Measures the time of a call of each operator on few tokens: checks, dispatch, allocation, launch."""
    torch.set_num_threads(1)
    if backend == "native":
        click.echo(f"{describe().processor}, 1 thread, torch {torch.__version__}; us a call\n{'':<36} native  eager")
        for name, (ours, eager) in measure_native(dim):
            click.echo(f"{name:<36} {ours * 1e6:6.1f} {eager * 1e6:6.1f}")
        return
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise click.ClickException("TRITON_INTERPRET=1 replaces what is measured; unset it")
    for name, seconds in measure_triton(dim=dim):
        click.echo(f"{name:<26} {seconds * 1e6:.0f} us a call")


if __name__ == "__main__":
    main()
