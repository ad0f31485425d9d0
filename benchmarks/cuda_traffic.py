"""Counts what the CUDA kernels move between global memory and the chip, in N C: the size of the tokens of an image.

    MSFORMER_CUDA_EMULATE=1 python -m benchmarks.cuda_traffic [--side 129] [--dim 100] [--dtype bfloat16] [--out FILE]

Their emulation on the CPU runs each operator forward and backward, as if it had the shared memory and multiprocessors
of `--target`, and counts the bytes of each kernel: those that it asks for, and those of the sectors of memory that it
touches, which is what passes a large cache. No time is measured.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import click
import torch
from torch import Tensor

from .cuda_ahead_of_time import DTYPES, PROCESSORS, table
from .cuda_launches import TRAFFIC, Launch, recorded
from .occupancy import MULTIPROCESSORS

Row = tuple[object, ...]


def operations(side: int, dim: int, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Their forwards on one image, by name."""
    import msformer_kernels as kernels

    torch.manual_seed(0)
    tokens = side * side
    block = kernels.EfficientTransformerBlock(dim).to(dtype)
    plain = kernels.MixFFN(dim, 4 * dim).to(dtype)
    x = torch.randn(1, tokens, dim).to(dtype).requires_grad_()
    q, k, v = (torch.randn(1, 1, tokens, dim).to(dtype).requires_grad_() for _ in range(3))
    return {
        "self-attention with norm and residual": lambda: block.attn(x, norm=block.norm1, residual=True)[0],
        "MixFFN-skip with norms and residual": lambda: block.mlp(x, side, side, norm=block.norm2, residual=True),
        "MixFFN": lambda: plain(x, side, side),
        "attention on query, key and value": lambda: kernels.efficient_attention(q, k, v)[0],
    }


def rows_of(name: str, launches: Sequence[Launch], size: int) -> list[Row]:
    """A row for each kernel, and one for all of them."""
    every = Launch("**all**", "", 0, 0, *(sum(getattr(x, n) for x in launches) for n in ("asked", "read", "written")))
    return [
        (name, x.kernel, *(f"{n / size:.2f}" for n in (x.asked, x.read, x.written, x.read + x.written)))
        for x in (*launches, every)
    ]


def count(side: int, dim: int, dtype: torch.dtype) -> list[Row]:
    """Of every operation, forward and backward."""
    import msformer_kernels as kernels

    found: list[Row] = []
    size = side * side * dim * dtype.itemsize
    with kernels.use_backend("cuda"):
        for name, forward in operations(side, dim, dtype).items():
            with recorded(TRAFFIC) as launches:
                output = forward()
            found += rows_of(f"{name}, forward", launches, size)
            with recorded(TRAFFIC) as launches:
                output.backward(torch.randn_like(output))
            found += rows_of(f"{name}, backward", launches, size)
    return found


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--side", type=click.IntRange(1), default=129, show_default=True, help="Tokens across and down.")
@click.option("--dim", type=click.IntRange(1), default=100, show_default=True, help="Channels.")
@click.option("--dtype", type=click.Choice(tuple(DTYPES)), default="bfloat16", show_default=True)
@click.option("--target", type=click.Choice(tuple(PROCESSORS)), default="sm_90", show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default="benchmark-results/cuda-traffic.md")
def main(side: int, dim: int, dtype: str, target: str, out: Path) -> None:
    """Counts what the CUDA kernels move, without a GPU."""
    from msformer_kernels import explain
    from msformer_kernels.core.precision import float32_products

    if not explain().reasons["cuda"].startswith("usable"):
        raise click.ClickException(explain().reasons["cuda"])
    environment = {
        "MSFORMER_EMULATE_SHARED_KB": str(MULTIPROCESSORS[target].shared_limit // 1024),
        "MSFORMER_EMULATE_PROCESSORS": str(PROCESSORS[target]),
    }
    with mock.patch.dict(os.environ, environment), float32_products("high" if dtype == "tf32" else "highest"):
        rows = count(side, dim, DTYPES[dtype])
    head = f"{side} x {side} tokens, C = {dim}, {dtype}, {target}; in N C of that dtype\n\n"
    text = head + table(("operation", "kernel", "asked for", "read", "written", "read and written"), rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    click.echo(f"{text}\nwrote {out}")


if __name__ == "__main__":
    main()
