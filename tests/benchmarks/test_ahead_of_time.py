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

from benchmarks.host_time import measure_native
from tests.kernels.cases import require

ROOT = Path(__file__).parents[2]


def run_compiled(*command: str) -> subprocess.CompletedProcess[str]:
    """`python -m ...` where Triton compiles."""
    require("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_host_time_of_every_operator() -> None:
    done = run_compiled("benchmarks.host_time", "--backend", "triton")
    assert done.returncode == 0, done.stdout + done.stderr
    times = {name: float(time) for name, time in re.findall(r"^(\w+) +(\d+) us a call$", done.stdout, re.MULTILINE)}
    assert times.keys() == {"efficient_attention", "efficient_self_attention", "mix_ffn", "batch_norm"}
    assert min(times.values()) > 0


def test_host_time_of_native_calls_beside_eager() -> None:
    require("native")
    rows = measure_native(dim=8, repeats=2, rounds=1)
    assert [name for name, _ in rows if "backward" not in name] == [
        "linear", "efficient_self_attention", "mix_ffn", "efficient_attention", "batch_norm"
    ]  # fmt: skip
    assert len(rows) == 10
    assert all(len(seconds) == 2 and min(seconds) > 0 for _, seconds in rows)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("target", "dims"), [("sm_80", ()), ("sm_90", ()), ("gfx942", ()), ("sm_89", ("--dim", "64", "--dim", "100"))]
)
def test_every_kernel_compiles_without_spills(target: str, dims: tuple[str, ...], tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    done = run_compiled("benchmarks.ahead_of_time", "--target", target, *dims, "--out", str(table))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in table.read_text().splitlines() if line.startswith(f"| {target}")]
    assert len(rows) > 100
    for name in ("key_tokens_kernel", "token_backward_kernel", "context_kernel", "activation_kernel"):
        assert any(name in row for row in rows), name
