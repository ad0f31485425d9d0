"""The page of several machines, and why a machine does not run a variant."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
from click.testing import CliRunner

from benchmarks import left_out, machines
from benchmarks.records import read_results, save_to, slug
from tests.benchmarks.test_report import MACHINE, results, row

CASE = "block 1x9x7x8h1, float32 highest, forward + backward"


def test_machines_are_columns(tmp_path: Path) -> None:
    first = results(row("eager", 3.0, 4.0, 5.0), row("native", 1.0, 2.0, 3.0))
    second = results(row("eager", 6.0), row("compile", 3.0), row("native (amx)", 1.0), row("native (avx2)", 2.0))
    second.machine = replace(MACHINE, processor="<b>other</b>")
    second.rows[2].other_programs = 0.4
    second.left_out = ["CPU variant avx2: <i>none</i>"]
    paths = [save_to(tmp_path, each) for each in (first, second)]
    found = machines.document(machines._named(paths))
    about, eager, compiled = found.tables
    assert [cells[-1] for cells in about.rows] == ["at most 0.0 cores", "at most 0.4 cores"]
    assert about.notes == [f"{paths[1].stem} did not run CPU variant avx2: <i>none</i>"]
    assert eager.title == "How many times as fast as eager"
    assert eager.columns == ["case", paths[0].stem, paths[1].stem]
    assert eager.rows == [[CASE, "~2.00 x (2.00 s ± 25%)", "6.00 x! (1.00 s)"]]
    assert compiled.rows == [[CASE, "", "3.00 x! (1.00 s)"]]
    out = tmp_path / "page.html"
    done = CliRunner().invoke(machines.main, [*map(str, paths), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "<b>other" not in out.read_text()
    assert "&lt;i&gt;none" in out.read_text()


def test_a_file_that_is_none_of_ours_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    done = CliRunner().invoke(machines.main, [str(tmp_path / "bad.json"), "--out", str(tmp_path / "page.html")])
    assert done.exit_code == 1
    assert "bad.json: is not a results.json of msformer bench" in done.output
    assert not (tmp_path / "page.html").exists()


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [save_to(tmp_path / folder, results(row("native", 1.0))) for folder in ("a", "b")]
    assert [name.split("/")[0] for name in machines._named([*paths, paths[0]])] == ["a", "b"]


def test_the_stored_machines_can_be_drawn() -> None:
    paths = sorted((Path(machines.__file__).parent / "results").iterdir())
    assert paths
    for path in paths:
        found = read_results(path)
        assert found.complete
        assert path.name == f"{slug(found.machine)}.json"
    assert len(machines.document(machines._named(paths)).tables[0].rows) == len(paths)


class Native(NamedTuple):
    """Of the extension, what is asked."""

    refused: str | None
    threads: str | None = "libgomp"

    def thread_library(self) -> str | None:
        return self.threads

    def why_tiles_are_refused(self) -> str | None:
        return self.refused


@pytest.mark.parametrize(
    ("flags", "refused", "reason"),
    [
        ({"fpu", "avx2"}, None, "the processor has no amx_tile, amx_bf16"),
        ({"amx_tile", "amx_bf16"}, "Linux does not permit AMX tiles", "Linux does not permit AMX tiles"),
        ({"amx_tile", "amx_bf16"}, None, "this build of the kernels does not have it"),
        (set(), None, "the processor does not have it"),
    ],
)
def test_the_reason_why_a_variant_is_missing(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], refused: str | None, reason: str
) -> None:
    monkeypatch.setattr("msformer_kernels._native", Native(refused), raising=False)
    monkeypatch.setattr(left_out, "_flags", lambda: frozenset(flags))
    monkeypatch.setattr(left_out, "_is_x86", lambda: True)
    monkeypatch.setattr(left_out, "usable_variants", lambda: ("avx512_bf16", "avx512", "avx2", "plain"))
    assert left_out.missing_variants() == {"amx": reason}
    monkeypatch.setattr("msformer_kernels.available_backends", lambda: ("reference", "native"))
    assert left_out.left_out() == [f"CPU variant amx: {reason}"]


def test_kernels_on_one_thread_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rivals have more, and the comparison is not fair."""
    monkeypatch.setattr("msformer_kernels._native", Native(None, threads=None), raising=False)
    monkeypatch.setattr("msformer_kernels.available_backends", lambda: ("reference", "native"))
    monkeypatch.setattr(left_out, "missing_variants", dict)
    monkeypatch.setattr(left_out.torch, "get_num_threads", lambda: 2)
    assert left_out.left_out() == ["native kernels on more than one thread: no OpenMP runtime here"]
    monkeypatch.setattr(left_out.torch, "get_num_threads", lambda: 1)
    assert left_out.left_out() == []


def test_the_reason_why_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msformer_kernels.available_backends", lambda: ("reference",))
    explanation = mock.Mock(reasons={"native": "not usable: no compiler"})
    monkeypatch.setattr("msformer_kernels.explain", lambda device: explanation)
    assert left_out.left_out() == ["native kernels: no compiler"]
