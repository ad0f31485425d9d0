"""Compiles every Triton kernel for GPUs that need not be there, and checks what came out.

    python -m benchmarks.ahead_of_time [--target sm_90 ...] [--dtype bfloat16 ...] [--dim 100 ...] [--out FILE]
    make ahead-of-time TRITON=3.6.0     with that Triton in place of the installed one

The operators run on CPU tensors with launches replaced by compilation, so that what is compiled is what would be
launched: the same tile sizes, constants, and specialisations of sizes and strides. A kernel fails if it does not
compile, spills more than `SPILL_BUDGET` bytes a thread, wants more shared memory than the device has, holds a product
but no matrix instruction, or has wgmma with an operand in registers where ptxas may compile it wrongly (see
`msformer_kernels.triton.device`). The table has registers, stack (spills) and shared memory of each, and how many
programs a multiprocessor holds by its registers and by its shared memory.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch

from .occupancy import MULTIPROCESSORS, programs

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
DTYPES = ("bfloat16", "float32", "tf32")
"""float32 as PyTorch has it by default, and with tf32 allowed. The latter is for self-attention, whose folded form
serves float32 only so; other products of one tf32 term need less than those of three, which float32 has."""
DIMS = (32, 64, 100, 160, 256)
WITH_MASK = 100
"""The one of them that is compiled with a mask too."""
SPILL_BUDGET = 64
"""Bytes of stack a thread may have, most of which are spilled registers."""


@dataclass(frozen=True)
class Compiled:
    """One kernel, compiled for one target."""

    target: str
    dtype: str
    dims: tuple[int, ...]
    name: str
    tile: str
    warps: int
    registers: int
    stack: int
    shared: int
    matrix: str
    """The matrix instructions that it uses."""
    products: int
    """Products in its intermediate code."""
    unsafe: int
    """Warpgroup products with an operand in registers, compiled by a ptxas that may overwrite it."""

    @property
    def programs(self) -> tuple[int, int]:
        """That a multiprocessor holds, by registers and by shared memory."""
        return programs(self.target, self.warps, self.registers, self.shared)

    def faults(self) -> list[str]:
        found = []
        if self.stack > SPILL_BUDGET:
            found.append(f"{self.stack} bytes of stack, {SPILL_BUDGET} allowed")
        limit = MULTIPROCESSORS[self.target].shared_limit
        if self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory, the device has {limit}")
        if self.products and not self.matrix:
            found.append("products without matrix instructions")
        if self.unsafe:
            found.append(f"{self.unsafe} wgmma with an operand in registers, which this ptxas may overwrite")
        return found

    def __str__(self) -> str:
        return f"{self.name} {self.tile} ({self.dtype}, C = {self.dims[0]}) for {self.target}"


class _Driver:
    """Stands for the driver of a device that is not there."""

    def __init__(self, target: str) -> None:
        self.name = target
        self.target = _gpu_target(target)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return TARGETS.index(self.name)  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


def _gpu_target(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)


@contextmanager
def recorded_launches(target: str) -> Iterator[dict[str, tuple[Any, dict[str, Any]]]]:
    """Within the block, launching a kernel compiles it for `target` and adds it, by the hash of its code, to the
    result."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    found: dict[str, tuple[Any, dict[str, Any]]] = {}
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = launch(self, *args, grid=grid, warmup=True, **options)
        found.setdefault(compiled.hash, (compiled, options))
        return compiled

    active = "_active" if "_active" in vars(driver) else "active"  # before Triton 3.5
    with mock.patch.object(driver, active, _Driver(target)), mock.patch.object(JITFunction, "run", compile_only):
        yield found


def launch_everything(
    dim: int,
    dtype: torch.dtype,
    attention_only: bool = False,
    backend: str = "triton",
    size: tuple[int, int] = (4, 64),
) -> None:
    """Calls every operator, or self-attention only, forward and backward, on images of `size` tokens down and across:
    by default so wide that tiles of columns are whole."""
    import msformer_kernels as kernels
    from msformer_kernels.core import backends

    heads = {32: 1, 64: 2, 100: 1, 160: 5, 256: 8}.get(dim, 1)
    block = kernels.EfficientTransformerBlock(dim, num_heads=heads).to(dtype)
    mix_ffn = kernels.MixFFN(dim, 4 * dim).to(dtype)
    tokens = size[0] * size[1]
    x = torch.randn(1, tokens, dim, dtype=dtype, requires_grad=True)
    mask = torch.ones(1, tokens, dtype=torch.bool)
    q = torch.randn(1, heads, tokens, dim // heads, dtype=dtype, requires_grad=True)
    with mock.patch.object(backends, "_interpreted", True), kernels.use_backend(backend):
        if attention_only:
            sum(y.sum() for y in block.attn(x, norm=block.norm1, residual=True)).backward()
            return
        output, context = block(x, *size)
        (output.sum() + context.sum()).backward()
        mix_ffn(x, *size).sum().backward()
        kernels.efficient_attention(q, q, q)[0].sum().backward()
        kernels.batch_norm(x)[0].sum().backward()
        if dim == WITH_MASK:
            block.attn(x, mask=mask)[0].sum().backward()
            kernels.efficient_attention(q, q, q, mask=mask)[0].sum().backward()


def tool(name: str) -> str:
    """The path of one of NVIDIA's binary utilities, which Triton brings along."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _nvidia(compiled: Any, products: int) -> tuple[int, int, str]:
    """Registers and stack of a cubin, and matrix instructions if there are products: HMMA is mma.sync, HGMMA wgmma,
    UTC.MMA tcgen05."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True)
        disassemble = [tool("nvdisasm"), "-c", file.name]
        code = subprocess.run(disassemble, capture_output=True, text=True, check=True).stdout if products else ""
    numbers = {k: int(v) for k, v in re.findall(r"\b(REG|STACK):(\d+)", usage.stdout)}
    return numbers["REG"], numbers["STACK"], ", ".join(sorted(set(re.findall(r"\b(?:[HQ]G?|UTC[A-Z]?)MMA\b", code))))


def _amd(compiled: Any) -> tuple[int, int, str]:
    code = compiled.asm["amdgcn"]
    registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", code)[0])
    stack = int(re.findall(r"\.private_segment_fixed_size:\s+(\d+)", code)[0])
    return registers, stack, ", ".join(sorted(set(re.findall(r"\bv_mfma_[a-z0-9]+_[0-9x]+[a-z0-9_]*", code))))


def compile_all(target: str, dtype: str, dims: tuple[int, ...] = DIMS) -> list[Compiled]:
    """Every kernel that the operators launch for these channels, each once."""
    from msformer_kernels.core.precision import float32_products

    torch.set_num_threads(1)
    found: dict[str, tuple[Any, dict[str, Any], list[int]]] = {}
    with float32_products("high" if dtype == "tf32" else "highest"):
        for dim in dims:
            with recorded_launches(target) as launches:
                launch_everything(dim, torch.bfloat16 if dtype == "bfloat16" else torch.float32, dtype == "tf32")
            for key, (compiled, options) in launches.items():
                found.setdefault(key, (compiled, options, []))[2].append(dim)
    return [_measured(target, dtype, tuple(dims), *rest) for *rest, dims in found.values()]


def register_operands(ptx: str) -> int:
    """Warpgroup products whose left operand comes from registers, not from shared memory."""
    accumulators_and_left = r"wgmma\.mma_async[^{;]*\{[^}]*\},\s*\{"
    return len(re.findall(accumulators_and_left, ptx))


def _unsafe(target: str, compiled: Any) -> int:
    from msformer_kernels.triton.device import ptxas, wgmma_is_safe

    return 0 if target != "sm_90" or wgmma_is_safe(ptxas(90)) else register_operands(compiled.asm["ptx"])


def _measured(target: str, dtype: str, dims: tuple[int, ...], compiled: Any, options: dict[str, Any]) -> Compiled:
    products = len(re.findall(r"\btt\.dot\b", compiled.asm["ttir"]))
    registers, stack, matrix = _nvidia(compiled, products) if target.startswith("sm_") else _amd(compiled)
    tile = " ".join(f"{k}={v}" for k, v in options.items() if re.fullmatch(r"B[A-Z]", k))
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    unsafe = _unsafe(target, compiled)
    return Compiled(target, dtype, dims, compiled.name, tile, warps, registers, stack, shared, matrix, products, unsafe)


def table(kernels: list[Compiled]) -> str:
    """Markdown."""
    lines = [
        "| target | dtype | C | kernel | tile | warps | registers | stack | shared | programs: registers, shared"
        " | matrix instructions |",
        "| --- | --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    lines += [
        f"| {k.target} | {k.dtype} | {', '.join(map(str, k.dims))} | {k.name} | {k.tile} | {k.warps} | {k.registers}"
        f" | {k.stack} | {k.shared} | {k.programs[0]}, {k.programs[1]} | {k.matrix} |"
        for k in sorted(kernels, key=lambda k: (k.target, k.dtype, k.name, k.dims))
    ]
    return "\n".join(lines) + "\n"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--target", "targets", type=click.Choice(TARGETS), multiple=True, default=TARGETS, show_default=True)
@click.option("--dtype", "dtypes", type=click.Choice(DTYPES), multiple=True, default=DTYPES, show_default=True)
@click.option("--dim", "dims", type=click.IntRange(1), multiple=True, default=DIMS, show_default=True, help="Channels.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default="benchmark-results/ahead-of-time.md")
def main(targets: tuple[str, ...], dtypes: tuple[str, ...], dims: tuple[int, ...], out: Path) -> None:
    """Compiles every Triton kernel without a GPU; writes a table of registers, spills and shared memory."""
    import triton

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise click.ClickException("TRITON_INTERPRET=1 replaces the compiler; unset it")
    kernels: list[Compiled] = []
    jobs = [(target, dtype) for target in targets for dtype in dtypes]
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(compile_all, *job, dims) for job in jobs]
        for (target, dtype), future in zip(jobs, futures, strict=True):
            found = future.result()
            kernels += found
            faults = sum(bool(k.faults()) for k in found)
            click.echo(f"{target} {dtype}: {len(found)} kernels, {faults} with faults")
    for kernel in kernels:
        for fault in kernel.faults():
            click.echo(f"{kernel}: {fault}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(f"Triton {triton.__version__}\n\n{table(kernels)}")
    click.echo(f"wrote {out}")
    if any(k.faults() for k in kernels):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
