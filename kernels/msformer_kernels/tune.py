"""Finds launch options for the Triton kernels on this GPU and writes them to a table:

    python -m msformer_kernels.tune --out table.json [--kernel key_tokens ...] [--side 257]
    export MSFORMER_TRITON_TABLE=table.json

For every entry of the table (kernel, class of width, size of an element) one option after the other is varied while the
others stay, and the fastest kept. What is timed is forward + backward of the operator that launches the kernel.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import msformer_kernels as kernels
from msformer_kernels.core.precision import float32_products
from msformer_kernels.triton.device import architecture
from msformer_kernels.triton.table import TABLE, Options, entry_name, table_entry, trial

CHOICES = {
    "BN": (16, 32, 64, 128),
    "BD": (32, 64, 128),
    "BH": (32, 64, 128),
    "tile": (1024, 2048, 4096, 8192),
    "num_warps": (4, 8),
    "num_stages": (1, 2, 3, 4),
}
_PLAIN = ("attention_reduction", "attention_output", "attention_query_gradient")
_MIX_FFN = ("activation", "activation_backward", "convolution_backward")

Measure = Callable[[Callable[[], Any]], float]


def workload(kernel: str, limit: int, dtype: torch.dtype, side: int, device: str) -> Callable[[], Any]:
    """Forward + backward of an operator that launches this kernel with this entry."""
    dim = limit // 4 if kernel in _MIX_FFN else limit
    if kernel in _MIX_FFN:
        dim = min(dim, 128)
    block = kernels.EfficientTransformerBlock(dim).to(device, dtype)
    x = torch.randn(1, side * side, dim, device=device, dtype=dtype, requires_grad=True)

    def run() -> Tensor:
        if kernel in _PLAIN:
            heads = x[:, None]
            output = kernels.efficient_attention(heads, heads, heads, backend="triton")[0]
        elif kernel in _MIX_FFN:
            output = block.mlp(x, side, side, norm=block.norm2, residual=True)
        else:
            output = block.attn(x, norm=block.norm1, residual=True)[0]
        return torch.autograd.grad(output.sum(), x)[0]

    def with_triton() -> Tensor:
        with kernels.use_backend("triton"):
            return run()

    return with_triton


def tune_entry(kernel: str, limit: int, dtype: torch.dtype, run: Callable[[], Any], measure: Measure) -> Options:
    """The fastest options found, by varying one at a time."""
    like = torch.empty(0, dtype=dtype)
    name = entry_name(architecture(), kernel, limit, like.element_size())
    best = table_entry(kernel, limit, like)
    least = _measured(name, best, run, measure)
    for option in list(best):
        for value in CHOICES[option]:
            candidate = best | {option: value}
            if candidate == best:
                continue
            found = _measured(name, candidate, run, measure)
            if found < least:
                best, least = candidate, found
    return best


def _measured(name: str, options: Options, run: Callable[[], Any], measure: Measure) -> float:
    """Infinite where the options ask for more than the device has."""
    from triton.runtime.errors import OutOfResources

    with trial(name, options):
        try:
            return measure(run)
        except OutOfResources:
            return float("inf")


def tune(names: list[str], side: int, device: str, measure: Measure) -> dict[str, Options]:
    """Entries of a table, by name."""
    found = {}
    with float32_products("high"):
        for kernel in names:
            for limit, size in TABLE[kernel]:
                dtype = torch.bfloat16 if size == 2 else torch.float32
                run = workload(kernel, limit, dtype, side, device)
                name = entry_name(architecture(), kernel, limit, size)
                found[name] = tune_entry(kernel, limit, dtype, run, measure)
                print(name, found[name], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kernel", choices=list(TABLE), action="append", help="all of them by default")
    parser.add_argument("--side", type=int, default=257, help="of the image of tokens")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    from triton.testing import do_bench

    def measure(run: Callable[[], Any]) -> float:
        return float(do_bench(run, return_mode="median"))

    entries = tune(options.kernel or list(TABLE), options.side, "cuda", measure)
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    temporary = options.out.with_suffix(".tmp")
    temporary.write_text(json.dumps({"machine": machine, "entries": entries}, indent=1))
    temporary.rename(options.out)
    print(f"wrote {options.out}; to use it: export MSFORMER_TRITON_TABLE={options.out}")


if __name__ == "__main__":
    main()
