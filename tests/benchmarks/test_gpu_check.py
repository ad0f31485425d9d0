"""The GPU check, as far as it goes without one: accuracy of small cases in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.kernels.cases import require

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_checks_run_in_the_interpreter(tmp_path: Path) -> None:
    require("triton")
    out = tmp_path / "check.json"
    done = run("--device", "cpu", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all checks passed" in done.stdout
    found = json.loads(out.read_text())
    assert len(found["accuracy"]) == 6
    assert all(row["ok"] and row["repeats"] and 0 < row["ratio"] < 3 for row in found["accuracy"])
    assert found["times"] == [], "nothing is timed without a GPU"


def test_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path / "check.json"), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "there is no GPU here" in done.stdout
    assert not (tmp_path / "check.json").exists()
