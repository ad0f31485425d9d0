"""Lines for people, events for programs, silence; and how a command ends."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image as PILImage
from rich.text import Text

import msformer.runs.ways
from msformer import messages
from msformer.cli import main
from msformer.commands.base import EXIT_CODES
from msformer.commands.running import Run
from msformer.progress import RunProgress
from tests.msformer.commands.events import events, of_kind
from tests.msformer.conftest import QUICK_OPTIONS
from tests.msformer.test_cli import run


@pytest.fixture
def images(tmp_path: Path, picture: NDArray[Any]) -> Path:
    """An animation, and a file that is no image."""
    folder = tmp_path / "images"
    folder.mkdir()
    frames = [PILImage.fromarray(picture), PILImage.fromarray(picture[::-1].copy())]
    frames[0].save(folder / "ä.gif", save_all=True, append_images=frames[1:])
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def test_events_of_a_run(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("segment", images, "--out", out, *QUICK_OPTIONS, "--json")
    first = run(*arguments)
    assert first.exit_code == 1
    found = events(first)
    assert found[0]["event"] == "start"
    assert found[0]["images"] == 2
    assert found[0]["settings"]["size"] == 33
    done, failed = sorted(of_kind(found, "image"), key=lambda each: each["status"])
    record = json.loads((out / "ä.json").read_text(encoding="utf-8"))
    assert (done["status"], done["name"], done["record"]) == ("done", "ä", record)
    assert record["read"]["notes"] == ["the first of 2 pictures is read"]
    assert set(done["files"]) == {"ä.labels.png", "ä.overlay.png", "ä.json"}
    assert (failed["status"], failed["name"], failed["source"]) == ("failed", "broken", str(images / "broken.png"))
    assert "not an image that can be read" in failed["error"]
    assert [each["message"] for each in of_kind(found, "warning")] == [
        f"{images / 'ä.gif'}: {record['read']['notes'][0]}"
    ]
    assert found[-1]["counts"] == {"images": 2, "done": 1, "skipped": 0, "failed": 1}
    assert found[-1]["status"] == "failed"
    assert all((out / name).exists() for name in found[-1]["files"])
    assert "[1/2]" in first.stderr
    assert "1 of 2 images in" in first.stderr
    again = run(*arguments, "--quiet")
    assert [each["status"] for each in of_kind(events(again), "image")] == ["failed", "skipped"]
    assert events(again)[-1]["counts"] == {"images": 2, "done": 0, "skipped": 1, "failed": 1}
    assert again.stderr == f"failed: {images / 'broken.png'}: not an image that can be read\n"


def test_quiet_prints_errors_alone(images: Path, tmp_path: Path) -> None:
    (images / "broken.png").unlink()
    fine = run("segment", images, "--out", tmp_path / "out", "-q", *QUICK_OPTIONS)
    assert (fine.exit_code, fine.output) == (0, "")
    wrong = run("segment", tmp_path / "gone", "--out", tmp_path / "out", "--quiet")
    assert (wrong.exit_code, wrong.stdout) == (1, "")
    assert wrong.stderr == f"error: {tmp_path / 'gone'}: no such file or folder\n"


def test_events_of_runs_that_end_early(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = events(run("segment", tmp_path / "gone", "--out", tmp_path / "out", "--json"))
    assert [each["event"] for each in wrong] == ["error", "end"]
    assert "no such file or folder" in wrong[0]["message"]

    def interrupted(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(msformer.runs.ways, "segment", interrupted)
    stopped = run("segment", images, "--out", tmp_path / "out", "--json", *QUICK_OPTIONS)
    assert stopped.exit_code == 130
    assert events(stopped)[-1]["status"] == "interrupted"
    usage = run("segment", images, "--json")
    assert (usage.exit_code, usage.stdout) == (2, "")


def test_a_library_that_makes_an_error_of_ctrl_c(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swallowed(*arguments: Any, **options: Any) -> Any:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise TypeError("invalid matrix") from error

    monkeypatch.setattr("msformer.commands.running.finish", swallowed)
    monkeypatch.setattr("msformer.commands.running.run_all", lambda *arguments: Run())
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    stopped = run("segment", images, "--out", tmp_path / "out")
    assert signal.signal(signal.SIGINT, handler) is signal.default_int_handler
    assert stopped.exit_code == 130
    assert stopped.stderr.startswith("interrupted; ")


def test_every_command_can_be_quiet_and_tell_events() -> None:
    for name in main.commands:
        shown = run(name, "--help").output
        assert "--quiet" in shown, name
        assert "--json" in shown, name
    listed = run("--help").output
    for code, meaning in EXIT_CODES.items():
        assert f"{code:<4} {meaning}" in " ".join(listed.split("\n")), "the table of exit codes"
    assert run("--version").output.startswith("msformer, version ")


def test_an_event_is_ascii_and_plain_json(capsys: pytest.CaptureFixture[str]) -> None:
    with messages.telling(json=True):
        messages.tell(
            "image", name=os.fsdecode(b"M\xfcller \xf0\x9f\x98\x80\n\x1b"), path=Path("a"), value=float("nan")
        )
    line = capsys.readouterr().out
    assert line.isascii()
    assert line.count("\n") == 1
    found = json.loads(line)
    assert found == {"event": "image", "name": "M\ufffdller 😀\n\x1b", "path": "a", "value": None}
    messages.tell("image")
    assert capsys.readouterr().out == "", "nobody listens any more"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("colours", [True, False])
def test_colours_and_bars_are_for_terminals(colours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may have no colours, if the user says so."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    if not colours:
        monkeypatch.setenv("NO_COLOR", "1")
    shown = {}
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stdout", stream)
        messages.console().print(Text("red", style="red"))
        with RunProgress(2) as progress:
            progress.start("a")(1, 2, "half")
            progress.ended("a", "fine")
        shown[stream.isatty()] = stream.getvalue()
    assert ("\x1b[31m" in shown[True]) == colours
    assert "\x1b[?25l" in shown[True], "a bar hides the cursor"
    assert shown[False] == "red\n[1/2] a: fine; about 0 s left\n"


def test_completion() -> None:
    for shell in ("bash", "zsh", "fish"):
        found = run("completion", shell)
        assert found.exit_code == 0, found.output
        assert "_MSFORMER_COMPLETE" in found.output
    assert events(run("completion", "fish", "--json"))[0]["script"] in found.output
    assert run("completion", "tcsh").exit_code == 2

    def completed(words: str) -> list[str]:
        asked = {"_MSFORMER_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        answer = CliRunner().invoke(main, prog_name="msformer", env=asked)
        return [line.partition(",")[2] for line in answer.output.splitlines()]

    assert completed("msformer se") == ["segment"]
    assert completed("msformer segment --pres") == ["--preset"]
    assert completed("msformer segment --preset q") == ["quick"]
