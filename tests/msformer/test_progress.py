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
        "[6/7] b: failed: no reason; about 3 min left",
        "[7/7] c: fine",
        "3 of 7 maps were already done with these settings",
    ]


def test_time_left_where_it_is_known_what_is_to_be_made(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with RunProgress(100, "maps", to_make=3) as progress:
        for _ in range(50):
            progress.skipped()
        progress.start("a")
        now += 20
        progress.ended("a", "fine")
    assert capsys.readouterr().out.splitlines()[0] == "[51/100] a: fine; about 40 s left"
