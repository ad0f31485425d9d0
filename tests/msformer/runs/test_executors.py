"""Executors that need no Ray, and what runs make of one that ends its items in any order."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner

from msformer import options
from msformer.cli import main
from msformer.evaluation import command
from msformer.output import write_files
from msformer.runs.executors import Executor, Interrupted, Item, Local, Report, Value, Work
from tests.msformer.conftest import QUICK_OPTIONS
from tests.msformer.evaluation import data
from tests.msformer.evaluation.test_command import evaluate
from tests.msformer.test_cli import files, run

HERE = Path()


def silent(item: Any) -> Report:
    return lambda *done: None


class Backwards(Executor):
    """Ends the items in the opposite order."""

    facts = {"cluster": {"nodes": 7}}  # noqa: RUF012

    def run(
        self, work: Work[Item, Value], items: Iterable[Item], folder: Path, start: Callable[[Item], Report]
    ) -> Generator[tuple[Item, Future[Value]], None, None]:
        yield from reversed(list(Local(1).run(work, items, folder, start)))


def double(item: int, folder: Path, report: Report) -> int:
    if item == 2:
        raise ValueError("two")
    return 2 * item


@pytest.mark.parametrize("at_once", [1, 3])
def test_every_item_has_an_outcome(at_once: int) -> None:
    outcomes = dict(Local(at_once).run(double, range(7), HERE, silent))
    assert sorted(outcomes) == list(range(7))
    assert {item: outcome.result() for item, outcome in outcomes.items() if item != 2} == {
        item: 2 * item for item in (0, 1, 3, 4, 5, 6)
    }
    with pytest.raises(ValueError, match="two"):
        outcomes[2].result()


@pytest.mark.parametrize("at_once", [1, 3])
def test_items_are_taken_when_there_is_room(at_once: int) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(20):
            taken.append(item)
            yield item

    for ended, _ in enumerate(Local(at_once).run(double, items(), HERE, silent)):
        assert len(taken) - ended <= at_once


def test_closing_ends_items_at_their_next_report() -> None:
    first, ends = threading.Event(), []

    def work(item: int, folder: Path, report: Report) -> None:
        if item == 0:
            first.wait(10)
            return
        try:
            while True:
                first.set()
                report(1, 2)
        except Interrupted:
            ends.append(item)

    with closing(Local(3).run(work, range(3), HERE, silent)) as outcomes:
        assert next(outcomes)[0] == 0
    assert sorted(ends) == [1, 2]


def test_a_run_says_the_same_in_whatever_order_images_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = data.make_pairs(tmp_path / "data", ("a", "b", "c"))
    (folder / "images" / "b.png").write_bytes(b"no image")
    segmented, scored = [], []
    for name in ("forwards", "backwards"):
        out = tmp_path / name
        result = run("segment", folder / "images", "--out", out, *QUICK_OPTIONS)
        assert result.exit_code == 1
        summary = json.loads((out / "summary.json").read_text())
        assert summary.get("cluster") == (None if name == "forwards" else {"nodes": 7})
        segmented.append([{k: v for k, v in image.items() if k != "seconds"} for image in summary["images"]])
        result = evaluate("--data", folder, "--methods", "otsu", "--out", out / "report")
        assert result.exit_code == 1
        assert "[2/6] b: failed" in result.output or "[4/6] b: failed" in result.output
        tables = (pd.read_csv(out / "report" / f"{table}.csv") for table in ("scores", "summary"))
        scored.append([table.drop(columns="seconds").to_csv() for table in tables])
        monkeypatch.setattr("msformer.commands.segment.make_executor", lambda *arguments, **more: Backwards())
        monkeypatch.setattr(command, "make_executor", lambda *arguments, **more: Backwards())
    assert segmented[0] == segmented[1]
    assert scored[0] == scored[1]
    assert "nodes 7" in (tmp_path / "backwards" / "report" / "report.md").read_text()


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = data.make_pairs(tmp_path / "data", ("a",))
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "msformer.runs.cluster", raising=False)
    for arguments in (("segment", folder / "images"), ("evaluate", "--data", folder)):
        result = run(*arguments, "--out", tmp_path / "out", "--cluster", "auto")
        assert result.exit_code == 1
        assert "error: ray is not installed; run: pip install 'msformer[cluster]'" in result.output
    assert not (tmp_path / "out").exists()
    assert run("segment", folder / "images", "--out", tmp_path / "out", *QUICK_OPTIONS).exit_code == 0


def test_threads_are_those_of_tasks(tmp_path: Path) -> None:
    folder = data.make_pairs(tmp_path / "data", ("a",))
    result = CliRunner().invoke(main, ["segment", str(folder), "--out", str(tmp_path / "out"), "--threads", "2"])
    assert result.exit_code == 2
    assert "--threads is for --cluster, which is not given" in result.output


def test_at_once_is_as_given_or_as_suits_the_device() -> None:
    for given, expected in ((None, 4), (2, 2)):
        executor = options.make_executor(None, None, "cuda", at_once=given, here=4)
        assert isinstance(executor, Local)
        assert executor.at_once == expected


def test_records_are_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the old one goes first."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.json").write_text("old")
    written = {"sub/a.json": b"{}", "sub/a.mask.png": b"mask", "b/c.png": b"labels"}
    original = Path.write_bytes

    def write(path: Path, content: bytes) -> int:
        if content == b"labels":
            assert files(tmp_path) == {"sub/a.mask.png", path.relative_to(tmp_path).as_posix()}
            raise OSError(28, "No space left on device")
        return original(path, content)

    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(OSError, match="No space left"):
        write_files(written, tmp_path)
    monkeypatch.undo()
    write_files(written, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == written
