"""Compiles every CUDA kernel for GPUs that need not be there, and checks what came out.

    python -m benchmarks.cuda_ahead_of_time [--target sm_90 ...] [--dim 100 ...] [--out FILE]

It needs a clone, for it compiles what is in csrc. nvcc (csrc/toolchain.py says where it is looked for) compiles each
source of csrc/cuda for each target, and ptxas tells registers and spills. What a launch wants of shared memory depends
on sizes: the operators are called with CPU tensors of `SIDE` x `SIDE` tokens through the emulation, which records
launches without running them, as if it had the shared memory and the multiprocessors of the target; without the
emulation (MSFORMER_CUDA_EMULATE=1) that table is missing. A kernel fails if it does not compile, spills, or wants more
registers or shared memory than a block can have. The tables have registers, spills, shared memory, and how many blocks
a multiprocessor holds.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from unittest import mock

import click
import torch

from . import cuda_launches
from .ahead_of_time import DIMS, launch_everything
from .cuda_launches import name_and_engine
from .occupancy import MULTIPROCESSORS, programs

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "csrc"))
from extensions import CUDA_FLAGS, CUDA_KERNELS, host_compiler_of_nvcc
from toolchain import NotBuilt, find_compiler, find_nvcc

SIDE = 64
"""Tokens of an image across and down; tiles do not depend on their number."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "tf32": torch.float32}


PROCESSORS = {"sm_80": 108, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_120": 170}
"""Multiprocessors of an A100, RTX 4090, H100, B200 and RTX 5090."""


@dataclass(frozen=True)
class Kernel:
    """A kernel, compiled for one target."""

    target: str
    name: str
    engine: str
    """Its template arguments: how products are done, and the form."""
    threads: int
    registers: int
    spills: int
    """Bytes a thread, written and read."""
    stack: int

    def faults(self) -> list[str]:
        found = []
        if self.spills or self.stack:
            found.append(f"{self.spills} bytes of spills, {self.stack} of stack, none allowed")
        if not programs(self.target, self.threads // 32, self.registers, 0)[0]:
            found.append(f"{self.registers} registers for each of {self.threads} threads")
        return found

    def __str__(self) -> str:
        return f"{self.name}<{self.engine}> for {self.target}"


@dataclass(frozen=True)
class Launch:
    """What a call of an operator launches, for one target."""

    target: str
    dtype: str
    dim: int
    name: str
    engine: str
    threads: int
    shared: int

    def faults(self) -> list[str]:
        most = MULTIPROCESSORS[self.target].shared_limit
        return [f"{self.shared} bytes of shared memory, a block may have {most}"] if self.shared > most else []

    def __str__(self) -> str:
        return f"{self.name}<{self.engine}> ({self.dtype}, C = {self.dim}) for {self.target}"


def demangled(names: list[str]) -> list[str]:
    """The names in C++; as they are without a program that knows."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if not tool or not names:
        return names
    return subprocess.run([tool, *names], capture_output=True, text=True, check=True).stdout.splitlines()


def compiled(source: Path, target: str) -> list[Kernel]:
    """The kernels of a source for a target. Raises CalledProcessError if it does not compile."""
    nvcc, number = find_nvcc(), target.removeprefix("sm_")
    code = f"-gencode=arch=compute_{number},code=sm_{number}"
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *host_compiler_of_nvcc(find_compiler()), *CUDA_FLAGS, code, "-Xptxas=-v", "--keep"]
        command += [f"--keep-dir={folder}", "-c", str(source), "-o", f"{folder}/out.o"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        (ptx,) = Path(folder).glob(f"*{source.stem}*.ptx")
        threads = dict(re.findall(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)", ptx.read_text()))
    numbers = re.findall(
        r"entry function '([^']+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        told,
        re.DOTALL,
    )
    return [
        Kernel(
            target,
            *name_and_engine(demangled([name])[0]),
            threads=int(threads[name]),
            registers=int(registers),
            spills=int(stores) + int(loads),
            stack=int(stack),
        )
        for name, stack, stores, loads, registers in numbers
    ]


def launches(target: str, dtype: str, dim: int, attention_only: bool = False) -> list[Launch]:
    """What calls of every operator, or of self-attention, launch, each once; needs the emulation."""
    from msformer_kernels.core.precision import float32_products

    environment = {
        "MSFORMER_EMULATE_SHARED_KB": str(MULTIPROCESSORS[target].shared_limit // 1024),
        "MSFORMER_EMULATE_PROCESSORS": str(PROCESSORS[target]),
    }
    with (
        mock.patch.dict(os.environ, environment),
        float32_products("high" if dtype == "tf32" else "highest"),
        cuda_launches.recorded(cuda_launches.INSTEAD) as recorded,
    ):
        launch_everything(dim, DTYPES[dtype], attention_only, backend="cuda", size=(SIDE, SIDE))
    found = (Launch(target, dtype, dim, x.kernel, x.engine, x.threads, x.shared) for x in recorded)
    return list(dict.fromkeys(found))


def table(titles: Sequence[str], rows: Sequence[tuple[object, ...]]) -> str:
    """Markdown."""
    lines = [list(titles), ["---"] * len(titles), *([str(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def report(kernels: list[Kernel], launched: list[Launch]) -> str:
    """Both tables."""
    registers = {(k.target, k.name, k.engine): k.registers for k in kernels}
    by_registers = table(
        ("target", "kernel", "engine", "threads", "registers", "spills", "stack", "blocks"),
        [
            (k.target, k.name, k.engine, k.threads, k.registers, k.spills, k.stack,
             programs(k.target, k.threads // 32, k.registers, 0)[0])
            for k in sorted(kernels, key=str)
        ],
    )  # fmt: skip
    by_shared = table(
        ("target", "dtype", "C", "kernel", "engine", "threads", "shared", "blocks"),
        [
            (x.target, x.dtype, x.dim, x.name, x.engine, x.threads, x.shared,
             min(programs(x.target, x.threads // 32, registers[x.target, x.name, x.engine], x.shared)))
            for x in sorted(launched, key=str)
        ],
    )  # fmt: skip
    return f"{by_registers}\n{by_shared}" if launched else by_registers


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--target", "targets", type=click.Choice(tuple(PROCESSORS)), multiple=True, default=tuple(PROCESSORS))
@click.option("--dim", "dims", type=click.IntRange(1), multiple=True, default=DIMS, show_default=True, help="Channels.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), default="benchmark-results/cuda-ahead-of-time.md"
)
def main(targets: tuple[str, ...], dims: tuple[int, ...], out: Path) -> None:
    """Compiles every CUDA kernel without a GPU; writes tables of registers, spills and shared memory."""
    from msformer_kernels.core.backends import BackendError, explain

    try:
        version = subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    except NotBuilt as error:
        raise click.ClickException(str(error)) from error
    jobs = [(source, target) for target in targets for source in CUDA_KERNELS]
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            kernels = [kernel for found in pool.map(lambda job: compiled(*job), jobs) for kernel in found]
    except subprocess.CalledProcessError as error:
        raise click.ClickException(f"{' '.join(error.cmd)}: {error.stderr}") from error
    launched: list[Launch] = []
    faults: list[str] = []
    if explain().reasons["cuda"].startswith("usable"):
        for sizes in product(targets, DTYPES, dims):
            try:
                launched += launches(*sizes)
            except BackendError as error:  # of MixFFN, where there is little shared memory
                click.echo(f"{sizes[0]}, {sizes[1]}, C = {sizes[2]}: {error}")
                launched += launches(*sizes, attention_only=True)
            except RuntimeError as error:
                faults.append(f"{sizes[0]}, {sizes[1]}, C = {sizes[2]}: {error}")
    else:
        click.echo(f"no launches: {explain().reasons['cuda']}")
    checked: list[Kernel | Launch] = [*kernels, *launched]
    faults += [f"{each}: {fault}" for each in checked for fault in each.faults()]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(f"nvcc {version.splitlines()[-2]}\n\n{report(kernels, launched)}")
    click.echo("\n".join([*faults, f"{len(kernels)} kernels, {len(launched)} launches; wrote {out}"]))
    if faults:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
