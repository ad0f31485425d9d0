"""The stages: what they ask for, in which order, and what they do with the answers."""

from __future__ import annotations

import inspect
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks.gpu import cases as C
from benchmarks.gpu import run as runner
from benchmarks.gpu import stages, tools
from benchmarks.gpu.processes import ROOT
from benchmarks.gpu.results import StageResult
from benchmarks.gpu.signals import Interrupted
from benchmarks.gpu.stages import NAMES, STAGES, Stage, contenders
from benchmarks.gpu.verdicts import judge_variants
from tests.benchmarks.gpu.fakes import RecordingSession, some_results


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecordingSession:
    """A session in which two backends are there, one of them compiled by Triton."""
    monkeypatch.setattr(C, "uses_triton", lambda backend: backend == "triton")
    monkeypatch.setattr(tools, "find_cuda_tool", lambda name: f"/bin/{name}")
    monkeypatch.setattr(stages, "other_ptxas", lambda: ("/new/ptxas", "13.1.80"))
    return RecordingSession(some_results(tmp_path))


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_item_names_a_function_that_takes_its_arguments(recorded: RecordingSession, stage: Stage) -> None:
    stage.run(recorded, recorded.results.stages[stage.name])
    assert recorded.items
    assert len({item.name for item in recorded.items}) == len(recorded.items)
    for item in recorded.items:
        module, _, function = item.call.partition(":")
        inspect.signature(getattr(import_module(module, "benchmarks.gpu"), function)).bind(**item.arguments)
        assert item.limit >= item.seconds
        if isinstance(content := item.arguments.get("case"), dict):
            assert C.GpuCase.from_json(content).to_json() == content


@pytest.mark.parametrize("name", ["accuracy-bf16", "block-times", "accuracy", "repeatability", "graphs", "fit", "ncu"])
def test_every_backend_has_its_rows(recorded: RecordingSession, name: str) -> None:
    next(stage for stage in STAGES if stage.name == name).run(recorded, StageResult(name))
    asked = [item.arguments.get("backend") for item in recorded.items]
    assert asked.count("triton") == asked.count("other") > 0


def test_the_flagship_comes_first() -> None:
    first = ["preflight", "machine", "precompile", "accuracy-bf16", "block-times", "accuracy"]
    assert list(NAMES[: len(first)]) == first
    assert C.BLOCK_ROWS[0].shape.height == 257
    assert [c.name for c in contenders(["triton"])] == ["triton", "triton, graph", "eager", "compile", "max-autotune"]


def test_rivals_that_compile_have_a_process_and_a_limit_of_their_own() -> None:
    items = {c.name: c.item(C.BLOCK_ROWS[0], "cuda") for c in contenders(["triton"])}
    assert items["max-autotune"].fresh
    assert items["compile"].fresh
    assert items["max-autotune"].limit <= 120
    assert not items["triton"].fresh
    assert [name for name, item in items.items() if item.required] == ["triton", "triton, graph"]


def test_later_times_are_those_that_are_missing(recorded: RecordingSession) -> None:
    case = C.BLOCK_ROWS[0]
    done, failed = recorded.results.stages["block-times"], recorded.results.stages["times"]
    done.rows.append({"case": str(case), "contender": "triton"})
    failed.skip(f"time of {case}, compile", "not finished within 90 s")
    failed.skip(f"time of {case}, max-autotune", "no time left")
    stages.times(recorded, recorded.results.stages["late-times"])
    names = {item.name for item in recorded.items}
    assert not names & {f"time of {case}, triton", f"time of {case}, compile"}
    assert f"time of {case}, max-autotune" in names


def test_graphs_are_captured_of_the_folded_form_too() -> None:
    from msformer_kernels.ops.efficient_self_attention.triton_calls import MOST_FOLDED

    assert {case.dtype for case in C.GRAPHS} >= {"bfloat16", "tf32", "float32"}
    assert all(case.shape.dim <= MOST_FOLDED for case in (*C.GRAPHS, *C.FOLDED))


def test_the_variants_of_the_folded_attention(recorded: RecordingSession) -> None:
    stages.miscompilation(recorded, StageResult("miscompilation"))
    environments = [item.environment for item in recorded.items]
    assert environments == [{}, {}, {"DISABLE_MMA_V3": "1"}, {"TRITON_PTXAS_PATH": "/new/ptxas"}]
    recorded.items.clear()
    recorded.results.machine = {"capability": "8.0"}
    stage = StageResult("miscompilation")
    stages.miscompilation(recorded, stage)
    assert not recorded.items
    assert "8.0" in stage.skipped[0]["why"]


@pytest.mark.parametrize(
    ("as_it_is", "safe", "newer", "sentence"),
    [
        (True, True, True, "right in every way of compiling"),
        (False, True, True, "MISCOMPILED as it is; right with DISABLE_MMA_V3=1 and ptxas 13"),
        (True, False, True, "right as it is; WRONG with DISABLE_MMA_V3=1"),
        (False, False, False, "WRONG in every way of compiling"),
    ],
)
def test_what_the_variants_say(as_it_is: bool, safe: bool, newer: bool, sentence: str) -> None:
    found = {"as it is": as_it_is, "DISABLE_MMA_V3=1": safe, "ptxas 13": newer}
    rows = [{"case": "c", "backend": "b", "variant": name, "ok": ok, "ratio": 1.0} for name, ok in found.items()]
    (text,) = judge_variants(rows)
    assert sentence in text


def test_each_kernel_is_compiled_by_one_process() -> None:
    """In a process in which Triton does not interpret; compilation itself is faked."""
    script = """
from types import SimpleNamespace
from unittest import mock
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from benchmarks.ahead_of_time import _Driver
from benchmarks.gpu import cases as C, precompile
from msformer_kernels.core import backends

fake = SimpleNamespace(run=None, n_regs=1, n_spills=0, metadata=SimpleNamespace(shared=0))

def launch(self, *arguments, grid, warmup, **options):
    assert warmup
    if "fold_backward" in self.__name__:
        raise RuntimeError("ptxas died")
    return fake

driver.set_active(_Driver("sm_90"))
cases = [case.to_json() for case in C.in_dtypes(C.SMALL, ("bfloat16",))]
with mock.patch.object(JITFunction, "run", launch), mock.patch.object(backends, "_interpreted", True):
    for parts in (1, 3):
        for part in range(parts):
            *rows, summary = precompile.compile_part(cases, "triton", part, parts, "cpu", model=False)
            print(parts, summary["kernels"], len(summary["failures"]), summary["ok"])
"""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "HOME": "/tmp"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    (whole,) = [int(line[1]) for line in lines if line[0] == "1"]
    parts = [int(line[1]) for line in lines if line[0] == "3"]
    assert whole > 15
    assert sum(parts) == whole
    assert min(parts) > 0
    failures = [int(line[2]) for line in lines]
    assert failures[0] == sum(failures[1:]) == 2, "of two dtypes or forms; recorded, and the others are compiled"
    assert lines[0][3] == "False"


def _chain(monkeypatch: pytest.MonkeyPatch, *chosen: Stage) -> None:
    monkeypatch.setattr(runner, "STAGES", chosen)
    monkeypatch.setattr(runner, "gpu_backends", lambda kind: ["triton"])


def _run(tmp_path: Path, *only: str) -> tuple[int, str]:
    out = tmp_path / "check.json"
    code = runner.run(out, only, "cuda", 1, time.monotonic() + 50, [])
    return code, out.read_text() + out.with_suffix(".md").read_text()


def _good(session: object, stage: StageResult) -> None:
    stage.rows.append({"operation": "something good", "backend": "triton", "us": 1.0})


def _bad(session: object, stage: StageResult) -> None:
    raise KeyError("a fault of the stage")


def test_a_stage_that_raises_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _chain(monkeypatch, Stage("machine", 1, _bad), Stage("host-time", 1, _good))
    code, text = _run(tmp_path)
    assert code == 1
    assert "KeyError: 'a fault of the stage'" in text
    assert "in _bad" in text, "the traceback"
    assert "something good" in text
    assert '"complete": true' in text


def test_there_is_a_result_on_disk_when_the_next_stage_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def look(session: object, stage: StageResult) -> None:
        seen.append((tmp_path / "check.json").read_text())

    _chain(monkeypatch, Stage("machine", 1, _good), Stage("fit", 1, look))
    _run(tmp_path)
    assert "something good" in seen[0]
    assert '"complete": false' in seen[0]


def test_an_interruption_leaves_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(session: object, stage: StageResult) -> None:
        stage.rows.append({"operation": "half of it", "backend": "triton", "us": 1.0})
        raise Interrupted(15)

    _chain(monkeypatch, Stage("host-time", 1, _good), Stage("times", 1, stop), Stage("fit", 1, _bad))
    code, text = _run(tmp_path)
    assert code == 128 + 15
    assert "something good" in text
    assert "half of it" in text
    assert "Not complete (ended by SIGTERM)" in text
    assert "| fit | not begun |" in text


def test_only_the_chosen_stages_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _chain(monkeypatch, Stage("machine", 1, _bad), Stage("host-time", 1, _good), Stage("ncu", 1, _bad))
    code, text = _run(tmp_path, "host-time")
    assert code == 0
    assert "something good" in text
    assert "| machine | not chosen |" in text
    assert "--only: expected one of preflight, machine" in runner.unknown_stages(["fit", "fits"])
    assert not runner.unknown_stages(["fit", "late-times"])


def test_a_file_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def block(session: object, stage: StageResult) -> None:
        (tmp_path / "check.json").unlink()
        (tmp_path / "check.json").mkdir()

    _chain(monkeypatch, Stage("machine", 1, block), Stage("host-time", 1, _good))
    assert runner.run(tmp_path / "check.json", [], "cuda", 1, time.monotonic() + 50, []) == 0
    assert "something good" in capsys.readouterr().out, "printed, as it could not be written"
