"""Every CUDA kernel compiles for GPUs that need not be there, within their registers and shared memory."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import msformer_kernels
from benchmarks import cuda_ahead_of_time
from benchmarks.ahead_of_time import tool
from benchmarks.cuda_ahead_of_time import Kernel, Launch, main
from benchmarks.occupancy import MULTIPROCESSORS
from tests.kernels.cases import require


def test_faults() -> None:
    good = Kernel("sm_90", "a_kernel", "Bf16", threads=512, registers=128, spills=0, stack=0)
    assert good.faults() == []
    assert Kernel("sm_90", "a_kernel", "Bf16", 512, 128, spills=4, stack=8).faults()
    assert Kernel("sm_90", "a_kernel", "Bf16", 512, 129, spills=0, stack=0).faults()
    most = MULTIPROCESSORS["sm_89"].shared_limit
    assert Launch("sm_89", "float32", 64, "a_kernel", "Tf32", 256, most).faults() == []
    assert Launch("sm_89", "float32", 64, "a_kernel", "Tf32", 256, most + 1).faults()


def test_spills_are_found(tmp_path: Path) -> None:
    """Of a kernel that keeps more than its registers hold."""
    nvcc_or_skip()
    source = tmp_path / "spilling.cu"
    source.write_text("""
template <class E> __global__ void __launch_bounds__(1024, 2) some_kernel(float* p) {
  float x[96];
#pragma unroll
  for (int i = 0; i < 96; i++) x[i] = p[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; i++) p[i * 1024 + threadIdx.x] = x[i] * x[95 - i] + x[(i * 7) % 96];
}
struct Wide {};
template __global__ void some_kernel<Wide>(float*);
""")
    (kernel,) = cuda_ahead_of_time.compiled(source, "sm_90")
    assert (kernel.name, kernel.engine, kernel.threads) == ("some_kernel", "Wide", 1024)
    assert kernel.registers == 32
    assert kernel.spills > 0
    assert any("spills" in fault for fault in kernel.faults())


def nvcc_or_skip() -> None:
    try:
        cuda_ahead_of_time.find_nvcc()
    except cuda_ahead_of_time.NotBuilt as error:
        pytest.skip(str(error))


def test_the_kernels_that_were_built_do_not_spill() -> None:
    """For the architectures of the install; spilled registers lie on the stack."""
    built = pytest.importorskip("msformer_kernels._cuda")
    command = [tool("cuobjdump"), "-res-usage", built.__file__]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stacks = dict(re.findall(r"Function (\w*msformer\w*):\s+REG:\d+ STACK:(\d+)", usage))
    assert len(stacks) > 80
    assert set(stacks.values()) == {"0"}, [name for name, stack in stacks.items() if stack != "0"]


@pytest.mark.slow(30)
def test_the_tables_have_kernels_and_launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc_or_skip()
    require("cuda")
    some = [source for source in cuda_ahead_of_time.CUDA_KERNELS if source.stem == "mix_ffn_forward"]
    monkeypatch.setattr(cuda_ahead_of_time, "CUDA_KERNELS", some)
    monkeypatch.setattr(cuda_ahead_of_time, "launch_everything", one_mix_ffn)
    table = tmp_path / "table.md"
    done = CliRunner().invoke(main, ["--target", "sm_80", "--dim", "32", "--out", str(table)])
    assert done.exit_code == 0, f"{done.output}{done.exception}"
    kernels, launches = (re.findall(r"(\w+_kernel)", part) for part in table.read_text().split("| target | dtype"))
    assert kernels == ["mix_ffn_forward_kernel"] * 4
    assert launches == ["mix_ffn_forward_kernel"] * 4


def one_mix_ffn(dim: int, dtype: torch.dtype, *_: object, **__: object) -> None:
    x, fc1, fc2 = torch.zeros(1, 64, dim), torch.zeros(8, dim), torch.zeros(dim, 8)
    arguments = [t.to(dtype) for t in (x, fc1, torch.zeros(8, 1, 3, 3), fc2)]
    x, fc1, taps, fc2 = arguments
    msformer_kernels.mix_ffn(x, 8, 8, fc1, None, taps, None, fc2, None, backend="cuda")
