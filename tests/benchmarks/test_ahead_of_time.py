"""Every Triton kernel compiles for GPUs that need not be there, within their registers and shared memory.

The compiler is not there in this process, whose kernels are interpreted.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.ahead_of_time import Compiled, register_operands
from benchmarks.host_time import measure_launches, measure_native
from benchmarks.occupancy import programs
from tests.kernels.cases import require

ROOT = Path(__file__).parents[2]


def run_compiled(*command: str) -> subprocess.CompletedProcess[str]:
    """`python -m ...` where Triton compiles."""
    require("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("target", "warps", "registers", "shared", "expected"),
    [
        ("sm_90", 8, 128, 0, (2, 8)),
        ("sm_90", 8, 129, 0, (1, 8)),  # 136, in units of 8
        ("sm_90", 4, 168, 0, (3, 16)),
        ("sm_90", 4, 32, 227 * 1024, (16, 1)),
        ("sm_90", 4, 32, 100 * 1024, (16, 2)),
        ("sm_89", 4, 32, 49 * 1024, (12, 2)),
        ("sm_120", 8, 255, 99 * 1024, (1, 1)),
        ("gfx942", 4, 256, 32 * 1024, (2, 2)),
    ],
)
def test_programs_of_a_multiprocessor(
    target: str, warps: int, registers: int, shared: int, expected: tuple[int, int]
) -> None:
    assert programs(target, warps, registers, shared) == expected


def test_warpgroup_products_with_an_operand_in_registers_are_counted() -> None:
    wgmma = "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%r1,\n%r2}, "
    ptx = f"{wgmma}%rd1, %rd2, p, 1, 1, 0, 1;\n" + 2 * f"{wgmma}{{%r7, %r8}}, %rd2, p, 1, 1, 0;\n"
    assert register_operands(ptx) == 2


def test_faults_of_a_kernel() -> None:
    def faults(stack: int = 0, shared: int = 0, matrix: str = "HGMMA", unsafe: int = 0) -> list[str]:
        return Compiled("sm_90", "tf32", (100,), "kernel", "", 4, 200, stack, shared, matrix, 1, unsafe).faults()

    assert faults(stack=64, shared=232448) == []
    assert "72 bytes of stack" in faults(stack=72)[0]
    assert "232449 bytes of shared memory, the device has 232448" in faults(shared=232449)[0]
    assert faults(matrix="") == ["products without matrix instructions"]
    assert "3 wgmma with an operand in registers" in faults(unsafe=3)[0]


@pytest.mark.slow(30)
def test_host_time_of_every_operator() -> None:
    done = run_compiled("benchmarks.host_time", "--backend", "triton")
    assert done.returncode == 0, done.stdout + done.stderr
    times = {name: (int(a), int(b)) for name, a, b in re.findall(r"^(\w+) +(\d+) +(\d+)$", done.stdout, re.MULTILINE)}
    assert times.keys() == {"efficient_attention", "efficient_self_attention", "mix_ffn", "batch_norm"}
    assert all(min(seconds) > 0 for seconds in times.values())


def test_host_time_of_cuda_calls() -> None:
    require("cuda")
    rows = measure_launches("cuda", dim=8, repeats=2, rounds=1)
    assert [name for name, *_ in rows] == ["efficient_self_attention", "mix_ffn", "efficient_attention"]
    assert all(path > 0 and whole > 0 for _, whole, path in rows)


def test_host_time_of_native_calls_beside_eager() -> None:
    require("native")
    rows = measure_native(dim=8, repeats=2, rounds=1)
    assert [name for name, _ in rows if "backward" not in name] == [
        "linear", "efficient_self_attention", "mix_ffn", "efficient_attention", "batch_norm"
    ]  # fmt: skip
    assert len(rows) == 10
    assert all(len(seconds) == 2 and min(seconds) > 0 for _, seconds in rows)


@pytest.mark.slow(30)
@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", ["sm_90"])
def test_every_kernel_compiles_without_spills(target: str, tmp_path: Path) -> None:
    """The other targets and sizes are for `make ahead-of-time`."""
    table = tmp_path / "table.md"
    done = run_compiled("benchmarks.ahead_of_time", "--target", target, "--dim", "100", "--out", str(table))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in table.read_text().splitlines() if line.startswith(f"| {target}")]
    assert len(rows) > 50
    for name in ("key_tokens_kernel", "token_backward_kernel", "context_kernel", "activation_kernel"):
        assert any(name in row for row in rows), name
