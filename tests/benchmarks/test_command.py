"""`python -m benchmarks`, in this process and as a program of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import click
import pytest
import torch
from click.testing import CliRunner, Result

from benchmarks import __main__ as command
from benchmarks.machine import Ceilings
from tests.msformer.commands.events import events, of_kind

TINY = ["--shape", "1x9x7x8h2", "--op", "block", "--rounds", "1", "--rival", "eager", "--rival", "published"]


@pytest.fixture(autouse=True)
def _quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the machine take seconds to measure; the tests of `measure_ceilings` are elsewhere."""
    monkeypatch.setattr(command, "measure_ceilings", lambda: Ceilings(1e12, "assumed", 1e10, "assumed"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command.main, [str(argument) for argument in arguments])


def test_a_tiny_run_writes_everything(tmp_path: Path) -> None:
    found = run(*TINY, "--passes", "forward", "--passes", "training", "--dtype", "bfloat16", "--out", tmp_path)
    assert found.exit_code == 0, found.output
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["complete"]
    assert {(row["rival"], row["passes"]) for row in content["rows"]} == {
        (rival, passes) for rival in ("published", "eager") for passes in ("forward", "training")
    }
    assert all(row["status"] == "measured" and row["seconds"] > 0 for row in content["rows"])
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.json",
        "report.md",
        "report.html",
        "block-bfloat16-forward.svg",
        "block-bfloat16-training.svg",
        "roofline-bfloat16.svg",
    }
    assert f"{torch.get_num_threads()} threads" in found.output
    assert "as published" in found.output
    assert "Summary" not in found.output  # of our kernels, which are not among the rivals
    both = ["--compare", tmp_path / "results.json", tmp_path / "results.json", "--out", tmp_path / "compared"]
    again = run(*both)
    assert again.exit_code == 0
    assert "too few samples" in again.output
    changes = of_kind(told := events(run(*both, "--json")), "change")
    assert {(change["name"], change["verdict"]) for change in changes} == {
        (f"block 1x9x7x8h2 bfloat16 {passes}", "too few samples") for passes in ("forward", "training")
    }
    assert all(change["old"] == change["new"] > 0 for change in changes)
    assert told[-1]["counts"] == {"rows": 4, "only_old": 0, "only_new": 0}
    assert told[-1]["files"] == ["comparison.md", "comparison.html", "comparison.svg"]
    names = {path.name for path in (tmp_path / "compared").iterdir()}
    assert names == {"comparison.md", "comparison.html", "comparison.svg"}


def test_results_that_are_not_complete_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "measure_case", mock.Mock(side_effect=KeyboardInterrupt))
    stopped = run(*TINY, "--out", tmp_path / "out", "--save-to", tmp_path / "more")
    assert stopped.exit_code == 130
    assert stopped.stderr.startswith("interrupted; writing what was measured\nwarning: not written to ")
    assert not (tmp_path / "more").exists()


def test_events_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = tmp_path / "machines"
    found = run(*TINY, "--out", tmp_path / "out", "--save-to", saved, "--json")
    told = events(found)
    assert [each["event"] for each in told if each["event"] != "progress"] == ["start", "facts", "row", "row", "end"]
    start, facts = told[:2]
    assert (start["cases"], start["rows"], start["dry_run"]) == (1, 2, False)
    assert start["settings"]["threads"] == torch.get_num_threads()
    assert facts["ceilings"]["flop_per_second"] == 1e12
    progress = of_kind(told, "progress")[0]
    assert (progress["name"], progress["done"], progress["total"]) == ("block 1x9x7x8h2 float32 highest training", 0, 7)
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["record"] for row in of_kind(told, "row")] == content["rows"]
    assert told[-1]["counts"] == {"rows": 2, "done": 2, "failed": 0}
    (path,) = saved.iterdir()
    assert path.read_bytes() == (tmp_path / "out" / "results.json").read_bytes()
    assert {path.name for path in (tmp_path / "out").iterdir()} | {str(path)} == set(told[-1]["files"])
    assert "as published" in found.stderr
    monkeypatch.setattr(command, "measure_ceilings", mock.Mock(side_effect=KeyboardInterrupt))
    stopped = run(*TINY, "--out", tmp_path / "out", "--json")
    assert events(stopped)[-1]["status"] == "interrupted"
    assert stopped.stderr == "interrupted\n"


def test_quiet_prints_errors_alone() -> None:
    wrong = run("--compare", __file__, __file__, "-q")
    assert (wrong.exit_code, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith(f"error: {__file__}: is not JSON: ")


def test_a_dry_run_measures_and_writes_nothing(tmp_path: Path) -> None:
    arguments = [*TINY, "--passes", "forward", "--passes", "training", "--out", tmp_path / "out", "--dry-run"]
    found = run(*arguments)
    assert found.exit_code == 0, found.output
    assert "block 1x9x7x8h2 float32 highest forward: published, eager\n" in found.output
    assert "would time 4 rows of 2 cases in at most 1 rounds" in found.output
    told = events(run(*arguments, "--json"))
    assert [(row["rival"], row["status"]) for row in of_kind(told, "row")] == [
        (rival, "would run") for rival in ("published", "eager") * 2
    ]
    assert told[0]["dry_run"]
    assert told[-1]["counts"] == {"rows": 4, "done": 4, "failed": 0}
    assert not (tmp_path / "out").exists()


def test_ceilings_are_the_best_of_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something else may have run during one of the two."""
    measured = [Ceilings(1e12, "a", 3e10, "b", None), Ceilings(2e12, "a", 1e10, "b", 5e12)]
    monkeypatch.setattr(command, "measure_ceilings", mock.Mock(side_effect=measured))
    quiet = run(*TINY, "--out", tmp_path, "--quiet")
    assert (quiet.exit_code, quiet.output) == (0, "")
    content = json.loads((tmp_path / "results.json").read_text())
    found = Ceilings(**content["ceilings"])
    assert (found.flop_per_second, found.bytes_per_second, found.pair_flop_per_second) == (2e12, 3e10, 5e12)
    for row in content["rows"]:
        least = max(row["flop"] / 2e12, row["bytes"] / 3e10)
        assert row["share_of_ceiling"] == pytest.approx(least / row["seconds"])


def test_variants_that_the_machine_lacks_are_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "missing_variants", lambda: {"amx": "Linux does not permit AMX tiles"})
    monkeypatch.setattr(command.rival_names, "all_rivals", lambda: ("eager", "native"))
    assert command.choose_rivals((), ("avx2", "amx")) == ("eager", "native (avx2)")
    with pytest.raises(click.UsageError, match="--isa: not on this machine: amx: Linux does not permit AMX tiles"):
        command.choose_rivals((), ("amx",))


def test_the_quick_selection_says_what_it_does_without() -> None:
    rivals = ("eager", "compile")
    plan = command.make_plan(False, (), (), (), rivals, ())
    (line,) = command.quick_left_out(plan, rivals)
    assert line.startswith("compile of step and image: ")
    assert command.quick_left_out(command.make_plan(False, ("step",), (), (), rivals, ()), rivals) == []


def test_every_precision_has_rows(tmp_path: Path) -> None:
    chosen = ["--precision", "highest", "--precision", "medium", "--dtype", "float32", "--dtype", "bfloat16"]
    found = run(*TINY, "--passes", "forward", *chosen, "--out", tmp_path)
    assert found.exit_code == 0, found.output
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    kinds = [("float32", "highest"), ("float32", "medium"), ("bfloat16", "highest")]
    assert [(row["dtype"], row["precision"]) for row in rows if row["rival"] == "eager"] == kinds
    assert "block 1x9x7x8h2, float32 medium, forward" in found.output
    assert torch.get_float32_matmul_precision() == "highest"


def test_an_interruption_writes_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = command.measure_case

    def interrupted(case: object, *arguments: object) -> object:
        if case.passes == "training":  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return measure(case, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(command, "measure_case", interrupted)
    found = run(*TINY, "--passes", "forward", "--passes", "training", "--out", tmp_path)
    assert found.exit_code == 130
    content = json.loads((tmp_path / "results.json").read_text())
    assert not content["complete"]
    assert [row["passes"] for row in content["rows"]] == ["forward", "forward"]
    assert "Interrupted" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "big"], "'--shape': 'big' is not a shape; expected BATCHxHEIGHTxWIDTHxDIM"),
        (["--op", "conv"], "'--op': 'conv' is not one of"),
        (["--rival", "jax"], "'--rival': 'jax' is not one of 'published', 'eager', 'compile'"),
        (["--dtype", "int8"], "'--dtype': 'int8' is not one of"),
        (["--precision", "low"], "'--precision': 'low' is not one of 'highest', 'high', 'medium'"),
        (["--isa", "mmx"], "'--isa': 'mmx' is not one of 'all'"),
        (["--isa", "all", "--rival", "eager"], "--isa needs the native kernels among the rivals"),
        (["--rounds", "0"], "'--rounds': 0 is not in the range x>=1"),
        (["--op", "step", "--shape", "1x9x9x8"], "step needs images of at least 33 x 33"),
        (["--op", "image", "--dtype", "bfloat16"], "nothing to measure"),
        (["--compare", "nowhere.json", "nowhere.json"], "'nowhere.json' does not exist"),
        (["--compare", __file__, __file__, "--rounds", "1", "--dry-run"], "--rounds, --dry-run: of a measurement"),
    ],
)
def test_bad_values_are_named(arguments: list[str], message: str) -> None:
    found = run(*arguments)
    assert found.exit_code == 2
    assert message in " ".join(found.output.split())


def test_files_of_another_kind_cannot_be_compared(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("{}")
    found = run("--compare", path, path)
    assert found.exit_code == 1
    assert "a.json: is not a results.json of msformer bench" in found.output


def test_an_output_folder_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = run(*TINY, "--out", tmp_path / "file")
    assert found.exit_code == 1
    assert "cannot make the folder" in found.output


def test_pytest_benchmark_collects_every_operation_and_plain_pytest_none(pytestconfig: pytest.Config) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "benchmarks"]
    benches = subprocess.run(command, cwd=root, env=os.environ, capture_output=True, text=True, check=False).stdout
    for name in ("attention", "mix_ffn", "block", "step", "image"):
        assert f"bench_rivals.py::test_rival[{name}-" in benches
    assert benches.count("-eager]") == 6
    assert pytestconfig.getini("testpaths") == ["tests"]
    assert not list((root / "tests").rglob("bench_*.py"))
