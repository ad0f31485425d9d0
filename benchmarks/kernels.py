"""The two operators of a transformer block, forward and backward, by themselves: time and rate of every backend.

    python -m benchmarks.kernels [--size 257] [--dim 100] [--threads 2] [--rounds 5] [--dtype float32]

LayerNorm and residual included. Rates count the flop of the folded form (8, 22, 16 and 40 N C^2), whatever the backend
does. Backends take turns within a round; medians over rounds. MSFORMER_CPU_ISA chooses the instruction set.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import click
import torch
from torch import Tensor, nn

import msformer_kernels as kernels

FLOP = {"attention forward": 8, "attention backward": 22, "MixFFN-skip forward": 16, "MixFFN-skip backward": 40}


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def one_round(block: kernels.EfficientTransformerBlock, x: Tensor, size: int, gradient: Tensor) -> dict[str, float]:
    """Seconds of each kernel."""

    def forward_and_backward(name: str, call: Callable[[], Tensor]) -> dict[str, float]:
        outputs: list[Tensor] = []
        forward = timed(lambda: outputs.append(call()))
        return {f"{name} forward": forward, f"{name} backward": timed(lambda: outputs[0].backward(gradient))}

    return forward_and_backward("attention", lambda: block.attn(x, norm=block.norm1, residual=True)[0]) | (
        forward_and_backward("MixFFN-skip", lambda: block.mlp(x, size, size, norm=block.norm2, residual=True))
    )


@click.command()
@click.option("--size", default=257, show_default=True)
@click.option("--dim", default=100, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--dtype", default="float32", type=click.Choice(["float32", "float64", "bfloat16", "float16"]))
def main(size: int, dim: int, threads: int, rounds: int, dtype: str) -> None:
    """Times the kernels of a transformer block."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    block: nn.Module = kernels.EfficientTransformerBlock(dim).to(kind)
    x = torch.randn(1, size * size, dim, dtype=kind, requires_grad=True)
    gradient = torch.randn_like(x)
    names = kernels.available_backends("cpu", kind)
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(rounds + 1):  # the first round warms up
        for name in names:
            with kernels.use_backend(name):
                seconds[name].append(one_round(block, x, size, gradient))  # type: ignore[arg-type]
    click.echo(f"{size} x {size} tokens, C = {dim}, {dtype}, {threads} threads, {rounds} rounds\n{kernels.explain()}\n")
    for kernel, flop in FLOP.items():
        medians = {name: statistics.median(found[kernel] for found in seconds[name][1:]) for name in names}
        for name, median in medians.items():
            rate = flop * size * size * dim * dim / median / 1e9
            click.echo(
                f"{kernel:<22}{name:<11}{1e3 * median:8.1f} ms {rate:7.0f} GF/s {medians['reference'] / median:6.2f} x"
            )


if __name__ == "__main__":
    main()
