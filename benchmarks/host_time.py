"""The host's time for a call of each operator with the triton backend; no GPU is needed.

    python -m benchmarks.host_time

Everything happens but the launch by the driver: checks of the arguments, dispatch, allocation of the results (on the
CPU), choice of tiles, and Triton's own way to a compiled kernel. For few tokens, one thread, forward without gradients.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import click
import torch

from benchmarks.ahead_of_time import recorded_launches


def calls(dim: int) -> dict[str, Callable[[], Any]]:
    """A call of each operator, by name."""
    import msformer_kernels as kernels

    block = kernels.EfficientTransformerBlock(dim).bfloat16()
    x = torch.randn(1, 16, dim, dtype=torch.bfloat16)
    q = torch.randn(1, 1, 16, dim, dtype=torch.bfloat16)
    return {
        "efficient_self_attention": lambda: block.attn(x, norm=block.norm1, residual=True),
        "mix_ffn": lambda: block.mlp(x, 4, 4, norm=block.norm2, residual=True),
        "efficient_attention": lambda: kernels.efficient_attention(q, q, q),
        "batch_norm": lambda: kernels.batch_norm(x),
    }


def measure(target: str = "sm_90", dim: int = 32, repeats: int = 300) -> Iterator[tuple[str, float]]:
    """(operator, seconds a call)"""
    import msformer_kernels as kernels
    from msformer_kernels.core import backends

    torch.set_num_threads(1)
    interpreted = mock.patch.object(backends, "_interpreted", True)
    with recorded_launches(target), interpreted, kernels.use_backend("triton"), torch.no_grad():
        for name, call in calls(dim).items():
            for _ in range(20):
                call()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            yield name, (time.perf_counter() - start) / repeats


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measures the host's time for a call of each operator with the triton backend, without a GPU."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise click.ClickException("TRITON_INTERPRET=1 replaces what is measured; unset it")
    for name, seconds in measure():
        click.echo(f"{name:<26} {seconds * 1e6:.0f} us a call")


if __name__ == "__main__":
    main()
