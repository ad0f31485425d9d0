"""What a run says on the way."""

from __future__ import annotations

import time

import pytest

from msformer.progress import RunProgress


def test_lines_and_time_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with RunProgress(7, "maps") as progress:
        progress.skipped()
        progress.skipped()
        progress.start("a")(1, 2, "half")
        now += 10
        progress.ended("a", "fine")
        progress.skipped()
        progress.start("b")
        now += 590
        progress.ended("b", "failed: no reason", items=2)
        progress.start("c")
        progress.ended("c", "fine")
    assert capsys.readouterr().out.splitlines() == [
        "[3/7] a: fine; about 40 s left",
        "[6/7] b: failed: no reason; about 2 min left",
        "[7/7] c: fine",
        "3 of 7 maps were already done with these settings",
    ]
