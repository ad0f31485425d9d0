"""Items in worker processes: what they return, raise, take too long for, or crash."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.gpu.items import Item
from benchmarks.gpu.results import FAILED, Results, StageResult
from benchmarks.gpu.session import Session
from tests.benchmarks.gpu.fakes import CALLS, item, some_results


@pytest.fixture(scope="module")
def shared_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """Whose process, which takes seconds to start, serves many tests."""
    found = Session(some_results(tmp_path_factory.mktemp("session")), time.monotonic() + 200)
    yield found
    found.close()


@pytest.fixture
def session(shared_session: Session) -> Session:
    """With nothing found yet."""
    shared_session.results = some_results(shared_session.results.out.parent)
    shared_session.deadline, shared_session.reserved = time.monotonic() + 200, 0
    return shared_session


def test_rows_come_back_and_the_next_item_gets_the_same_process(session: Session) -> None:
    stage = session.results.stages["times"]
    session.run(stage, [item("echo", ms_of="a")])
    first = session._shared
    session.run(stage, [item("echo", ms_of="b")])
    assert session._shared is first
    assert [row["ms_of"] for row in stage.rows] == ["a", "b"]
    assert '"ms_of": "b"' in session.results.out.read_text(), "saved after every item"


def test_an_item_that_raises_or_skips_is_recorded_and_the_others_run(session: Session) -> None:
    stage = session.results.stages["times"]
    session.run(stage, [item("wrong"), item("unfit"), item("echo", kept=1)])
    stage.finish(1)
    assert stage.status == FAILED
    (failure,) = stage.failures
    assert failure["what"] == "wrong item"
    assert failure["error"] == "ValueError: of no use"
    assert "calls.py" in failure["traceback"]
    assert stage.skipped == [{"what": "unfit item", "why": "not on this machine"}]
    assert [row["kept"] for row in stage.rows] == [1]


def test_a_crash_costs_its_item_alone(session: Session) -> None:
    stage = session.results.stages["times"]
    session.run(stage, [item("crash"), item("echo", kept=1)])
    assert [failure["error"] for failure in stage.failures] == ["the process was ended by SIGSEGV"]
    assert [row["kept"] for row in stage.rows] == [1]
    assert "Segmentation fault" in session.results.log.read_text()


@pytest.mark.parametrize("fresh", [True, False])
def test_a_slow_rival_is_ended_at_its_limit(session: Session, fresh: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.session.LEAST_LIMIT", 1)
    stage = session.results.stages["times"]
    session.run(stage, [item("echo", kept=0)])  # starting takes its own time
    started = time.monotonic()
    session.run(stage, [item("slow", limit=1, fresh=fresh, seconds=100), item("echo", kept=1)])
    assert time.monotonic() - started < 60
    assert [failure["error"] for failure in stage.failures] == ["not finished within 1 s"]
    assert [row["kept"] for row in stage.rows] == [0, 1]


def test_no_item_is_begun_without_the_time_for_it(session: Session) -> None:
    stage = session.results.stages["times"]
    session.reserved = session.deadline - time.monotonic() - 30
    session.run(stage, [Item("long", f"{CALLS}:echo", {}, seconds=40), Item("short", f"{CALLS}:echo", {}, seconds=1)])
    assert stage.skipped == [{"what": "long", "why": "no time left"}]
    assert len(stage.rows) == 1


def test_items_run_together_each_in_its_environment(session: Session) -> None:
    stage = StageResult("miscompilation")
    items = [
        Item(f"variant {name}", f"{CALLS}:echo", {"name": name}, fresh=True, environment={"GPU_CHECK_TEST": name})
        for name in ("one", "two")
    ]
    session.run_together(stage, [*items, item("crash")])
    assert sorted((row["name"], row["variable"]) for row in stage.rows) == [("one", "one"), ("two", "two")]
    assert len(stage.failures) == 1


def test_closing_ends_what_is_running(tmp_path: Path) -> None:
    session = Session(some_results(tmp_path), time.monotonic() + 200)
    session.run(StageResult("times"), [item("echo")])
    assert session._shared is not None
    process = session._shared.process
    session.close()
    assert process.poll() is not None
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_results_of_a_stage_that_only_skipped(tmp_path: Path) -> None:
    results: Results = some_results(tmp_path)
    stage = results.stages["memcheck"]
    stage.skip("memcheck", "compute-sanitizer is not installed")
    stage.finish(0)
    assert stage.status == "skipped"
    assert not results.failed


def test_what_becomes_of_a_rival_is_not_a_failure_of_the_check(session: Session) -> None:
    stage = session.results.stages["times"]
    session.run(stage, [Item("rival", f"{CALLS}:wrong", {}, required=False), item("echo", kept=1)])
    stage.finish(1)
    assert stage.skipped == [{"what": "rival", "why": "ValueError: of no use"}]
    assert stage.status == "ok"
