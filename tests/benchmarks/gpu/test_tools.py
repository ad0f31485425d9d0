"""compute-sanitizer and Nsight Compute, replaced by scripts that print what those print."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.gpu import tools
from benchmarks.gpu.processes import Outcome
from benchmarks.gpu.results import StageResult
from benchmarks.gpu.session import Session
from benchmarks.gpu.tools import judge_memcheck, judge_profile, parse_profile
from tests.benchmarks.gpu.fakes import executable, item, some_results

CSV = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","dram__bytes.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed","gpu__time_duration.sum","launch__registers_per_thread","sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed"
"","","","byte","%","ns","register/thread","%"
"0","7","fold_kernel","1,000,000","10","5,000","64","0"
"1","7","token_kernel","30000000","60","20000","128","40"
"2","7","token_kernel","30000000","90","10000","128","10"
"""  # noqa: E501
ROW = {"case": "block", "backend": "triton", "dtype": "bfloat16", "bytes": 20e6, "flop": 1.0}


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    found = Session(some_results(tmp_path), time.monotonic() + 200)
    yield found
    found.close()


def test_an_item_runs_under_the_tool(session: Session, tmp_path: Path) -> None:
    tool = executable(tmp_path / "tool", 'echo "ERROR SUMMARY: 0 errors"; echo "$1"; shift; exec "$@"')
    seen = []

    def judge(code: int | None, text: str, found: Outcome) -> Outcome:
        seen.append((code, text))
        return found

    found = session.run_under([str(tool), "--option"], item("echo", kept=1), judge)
    assert found.rows[0]["kept"] == 1
    ((code, text),) = seen
    assert code == 0
    assert "--option" in text


def test_a_tool_that_hangs_is_ended(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.session.LEAST_LIMIT", 1)
    tool = executable(tmp_path / "tool", "sleep 100")
    started = time.monotonic()
    session.run_under(
        [str(tool)], item("echo", limit=1), lambda code, text, found: judge_memcheck("b", code, "", found)
    )
    assert time.monotonic() - started < 30


def test_memcheck_of_each_backend(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = executable(tmp_path / "compute-sanitizer", "echo '========= ERROR SUMMARY: 2 errors'; exit 9")
    monkeypatch.setattr(tools, "find_cuda_tool", lambda name: str(tool))
    stage = session.results.stages["memcheck"]
    tools.memcheck(session, stage)
    assert [(row["backend"], row["ok"], row["errors"]) for row in stage.rows] == [
        ("triton", False, 2),
        ("other", False, 2),
    ]
    monkeypatch.setattr(tools, "find_cuda_tool", lambda name: None)
    stage = StageResult("memcheck")
    tools.memcheck(session, stage)
    assert stage.skipped == [{"what": "memcheck", "why": "compute-sanitizer is not installed"}]


@pytest.mark.parametrize(
    ("code", "text", "ok", "skipped"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", True, ""),
        (9, "========= Invalid read\n========= ERROR SUMMARY: 3 errors", False, ""),
        (1, "Unable to attach to the process", None, "did not run: Unable to attach"),
        (None, "", None, "not finished"),
    ],
)
def test_what_memcheck_says(code: int | None, text: str, ok: bool | None, skipped: str) -> None:
    found = judge_memcheck("triton", code, text, Outcome([{"case": "c", "ok": True}]))
    assert [row["ok"] for row in found.rows] == ([] if ok is None else [ok])
    assert skipped in found.skipped
    if ok is False:
        assert "Invalid read" in found.traceback


def test_results_that_are_not_finite_fail_memcheck() -> None:
    found = judge_memcheck("triton", 0, "ERROR SUMMARY: 0 errors", Outcome([{"case": "c", "ok": False}]))
    assert found.rows == [{"backend": "triton", "ok": False, "errors": 0, "not finite": ["c"]}]


def test_kernels_of_a_profile() -> None:
    token, fold = parse_profile(CSV)
    assert (token["kernel"], token["launches"], token["us"], token["MB"]) == ("token_kernel", 2, 30.0, 60.0)
    assert token["DRAM %"] == pytest.approx(70), "by time"
    assert token["tensor cores %"] == pytest.approx(30)
    assert token["registers"] == 128
    assert (fold["kernel"], fold["MB"], fold["DRAM %"]) == ("fold_kernel", 1.0, 10.0)


def test_a_profile_is_compared_with_the_least_traffic() -> None:
    found = judge_profile(0, CSV, Outcome([ROW]))
    total = found.rows[-1]
    assert (total["kernel"], total["launches"], total["MB"]) == ("all", 3, 61.0)
    assert total["times the least traffic"] == pytest.approx(61 / 20)


@pytest.mark.parametrize(
    ("code", "text", "skipped", "error"),
    [
        (1, "==ERROR== ERR_NVGPUCTRPERM - no permission", "not permitted", ""),
        (None, "", "not finished", ""),
        (1, "==ERROR== Failed to find metric sm__x", "", "Failed to find metric sm__x"),
        (0, CSV.splitlines()[1], "", "no kernel was profiled"),
    ],
)
def test_profiles_that_are_none(code: int | None, text: str, skipped: str, error: str) -> None:
    found = judge_profile(code, text, Outcome([ROW]))
    assert skipped in found.skipped
    assert error in found.error
    assert not found.rows
    if text.startswith("==ERROR=="):
        assert judge_profile(code, text, Outcome(error="did not come to an end")) == found, "the tool says more"


def test_another_metric_is_tried_where_the_first_is_unknown(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = 'case "$*" in *pipe_tensor_cycles*) echo "==ERROR== Failed to find metric sm__pipe";; *) echo other;; esac'
    tool = executable(tmp_path / "ncu", script)
    monkeypatch.setattr(tools, "find_cuda_tool", lambda name: str(tool))
    monkeypatch.setattr(tools, "judge_profile", lambda code, text, found: Outcome(error=text.strip()))
    stage = session.results.stages["ncu"]
    tools.profile(session, stage)
    assert {failure["error"] for failure in stage.failures} == {"other"}
