"""The command of the GPU check, as far as it goes without one: in Triton's interpreter, and with stages of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import msformer_kernels as kernels
from benchmarks.gpu_check import main
from tests.kernels.cases import require

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def paths(*more: Path) -> dict[str, str]:
    """The environment in which these folders and the packages are found."""
    folders = [*more, ROOT, ROOT / "kernels", *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(map(str, folders))}


def test_checks_run_in_the_interpreter(tmp_path: Path) -> None:
    require("triton")
    out = tmp_path / "new" / "check.json"
    (tmp_path / "sitecustomize.py").write_text("import tests.kernels\n")  # which hastens the interpreter
    done = run("--device", "cpu", "--out", str(out), **paths(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All checks that were run passed" in done.stdout
    found = json.loads(out.read_text())
    assert found["complete"]
    emulated = ["cuda"] if "cuda" in kernels.available_backends() else []
    assert found["backends"] == [*emulated, "triton"]
    rows = [row for name in ("accuracy-bf16", "accuracy") for row in found["stages"][name]["rows"]]
    for backend in found["backends"]:
        assert [row["ok"] for row in rows if row["backend"] == backend] == [True] * 5
        assert [row["ok"] for row in found["stages"]["repeatability"]["rows"] if row["backend"] == backend] == [True]
    assert all(0 < row["ratio"] < 3 for row in rows)
    assert found["stages"]["times"]["status"] == "needs a GPU"
    assert "| block 1x2x5x12h1 bfloat16 | triton |" in out.with_suffix(".md").read_text()


def test_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    done = run("--out", str(out), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "FATAL   GPU: " in done.stdout
    assert "what to do: " in done.stdout
    found = json.loads(out.read_text())
    assert [f["what"] for f in found["findings"] if f["level"] == "FATAL"] == ["GPU"]
    assert not found["complete"]
    assert "Nothing was run" in out.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "speed"], "--only: expected one of preflight, machine"),
        (["--out", "/dev/null/check.json"], "--out: cannot make the folder"),
        (["--out", "check.md"], "expected one such as gpu-check.json"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--device", "cpu", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


INTERRUPTED = """
import sys, time
from pathlib import Path
from benchmarks.gpu import run
from benchmarks.gpu.signals import interruptible
from benchmarks.gpu.stages import Stage
from tests.benchmarks.gpu.fakes import item

def first(session, stage):
    session.run(stage, [item("echo", operation="kept", us=1.0)])

def second(session, stage):
    session.run(stage, [item("echo", operation="half", us=1.0), item("slow", seconds=100)])

def together(session, stage):
    session.run_together(stage, [item("slow", seconds=100), item("slow", seconds=101)])

chosen = {"one after the other": second, "together": together}[sys.argv[2]]
run.STAGES = (Stage("host-time", 1, first), Stage("fit", 1, chosen))
run.gpu_backends = lambda kind: []
with interruptible():
    sys.exit(run.run(Path(sys.argv[1]), [], "cuda", 2, time.monotonic() + 100, []))
"""


def children(process: int) -> list[int]:
    """Of whichever thread of the process."""
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


@pytest.mark.parametrize(
    ("number", "way"), [(signal.SIGTERM, "one after the other"), (signal.SIGINT, "together")], ids=str
)
def test_a_signal_leaves_a_partial_result_and_no_process(tmp_path: Path, number: signal.Signals, way: str) -> None:
    out = tmp_path / "check.json"
    command = [sys.executable, "-c", INTERRUPTED, str(out), way]
    with subprocess.Popen(command, env=os.environ | paths(), cwd=ROOT, text=True) as process:
        wanted, count = ("half", 1) if way == "one after the other" else ("kept", 3)
        until = time.monotonic() + 90
        while not (out.exists() and wanted in out.read_text() and len(children(process.pid)) >= count):
            assert time.monotonic() < until
            assert process.poll() is None
            time.sleep(0.1)
        workers = children(process.pid)
        process.send_signal(number)
        assert process.wait(30) == 128 + number
    found = json.loads(out.read_text())
    assert found["ended_by"] == number.name
    assert not found["complete"]
    assert [row["operation"] for row in found["stages"]["host-time"]["rows"]] == ["kept"]
    assert "Not complete (ended by" in out.with_suffix(".md").read_text()
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)
