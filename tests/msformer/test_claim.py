"""One run at a time in a folder, whatever became of the others."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from msformer import claim
from msformer.claim import LOCK, FolderInUse, claimed
from msformer.output import OutputError, machine
from tests.msformer.conftest import QUICK_OPTIONS
from tests.msformer.evaluation.data import disc, lesion, save
from tests.msformer.test_cli import files, run


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("BEAT", 0.05), ("SILENCE", 0.4), ("_LOOK", 0.02)):
        monkeypatch.setattr(claim, name, seconds)


def mark_of_another_machine(folder: Path) -> Path:
    mark = {"machine": "another", "host": "node7", "process": 1, "since": "2026-01-01 10:00:00"}
    (folder / LOCK).write_text(json.dumps(mark))
    return folder / LOCK


def test_the_second_run_says_so_and_ends(tmp_path: Path) -> None:
    image, out = save(tmp_path / "a.png", lesion(disc())), tmp_path / "out"
    commands = [["segment", image, "--out", out, *QUICK_OPTIONS], ["demo", "--out", out]]
    with claimed(out):
        for command in commands:
            result = run(*command)
            assert result.exit_code == 1
            assert f"{out}: another run, process {os.getpid()} on" in result.output
        assert files(out) == {LOCK}
    assert files(out) == set()
    assert run(*commands[0]).exit_code == 0


def test_a_run_that_was_killed_holds_nothing_back(tmp_path: Path) -> None:
    process = os.fork()
    if process == 0:
        with claimed(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    assert json.loads((tmp_path / LOCK).read_text())["process"] == process
    started = time.monotonic()
    with claimed(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    assert time.monotonic() - started < 0.3, "without waiting for a sign of life"
    assert files(tmp_path) == set()


@pytest.mark.parametrize("locks", [True, False])
def test_a_run_on_another_machine_is_believed_as_long_as_it_gives_signs_of_life(
    locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not locks:  # as some network file systems
        monkeypatch.setattr(claim, "locked", lambda handle: None)
    lock = mark_of_another_machine(tmp_path)
    over = threading.Event()
    alive = threading.Thread(target=lambda: [os.utime(lock) for _ in iter(lambda: over.wait(0.05), True)])
    alive.start()
    try:
        with pytest.raises(FolderInUse, match="process 1 on node7 since 2026-01-01 10:00:00"), claimed(tmp_path):
            pass
    finally:
        over.set()
        alive.join()
    assert "node7" in lock.read_text()
    with claimed(tmp_path):
        assert machine() in lock.read_text()
        time.sleep(0.2)
        assert time.time() - lock.stat().st_mtime < 0.15, "this run gives signs of life, too"
    assert "a run on node7 wrote to" in capsys.readouterr().err
    assert files(tmp_path) == set()


def test_a_run_on_another_machine_that_ended_long_ago_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "SILENCE", 30.0)
    os.utime(mark_of_another_machine(tmp_path), (time.time() - 100,) * 2)
    started = time.monotonic()
    with claimed(tmp_path):
        pass
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("content", [b"", b"{", b"[1]"])
def test_a_damaged_lock_is_taken_over(content: bytes, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_bytes(content)
    with claimed(tmp_path):
        pass
    assert files(tmp_path) == set()


def test_a_lock_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()
    with pytest.raises(OutputError, match="cannot write"), claimed(tmp_path):
        pass
