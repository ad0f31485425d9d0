"""`msformer bench`: the benchmarks as they are installed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from click.testing import CliRunner

import msformer
from benchmarks import __main__ as benchmarks
from msformer.cli import main
from tests.msformer.commands.events import events, of_kind

ROOT = Path(__file__).parents[3]


def test_the_command_is_that_of_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the name that an installed package has for it."""
    monkeypatch.setattr(msformer, "__path__", [*msformer.__path__, str(ROOT)])
    found = CliRunner().invoke(main, ["bench", "--help"], prog_name="msformer")
    assert found.exit_code == 0, found.output
    assert "Usage: msformer bench" in found.output
    assert "--compare" in found.output
    assert "msformer.benchmarks.__main__" in sys.modules
    wrong = CliRunner().invoke(main, ["bench", "--op", "conv", "--json"])
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert "'conv' is not one of" in wrong.stderr


@pytest.mark.parametrize("when", ["imported", "run"])
def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, when: str, tmp_path: Path) -> None:
    missing = mock.Mock(side_effect=ModuleNotFoundError("No module named 'psutil'", name="psutil"))
    imported = mock.Mock(return_value=benchmarks) if when == "run" else missing
    monkeypatch.setattr(benchmarks, "measure_ceilings", missing)
    monkeypatch.setattr("msformer.commands.bench.import_module", imported)
    found = CliRunner().invoke(main, ["bench", "--out", str(tmp_path), "--json"])
    assert found.exit_code == 1
    sentence = "psutil is not installed; run: pip install 'msformer[bench]'"
    assert f"error: {sentence}\n" in found.stderr
    assert of_kind(events(found), "error") == [{"event": "error", "message": sentence}]


def test_all_that_the_benchmarks_need_is_built(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path / "lib")]
    command += ["egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    built = tmp_path / "lib/msformer/benchmarks"
    sources = [path for path in (ROOT / "benchmarks").rglob("*") if path.suffix in (".py", ".cpp", ".html")]
    assert len(sources) > 40
    assert [path for path in sources if not (built / path.relative_to(ROOT / "benchmarks")).exists()] == []


def test_the_benchmarks_import_one_another_by_relative_names() -> None:
    """By another name they would be found in a checkout alone; `gpu_check.py` finds it when it is run by its path."""
    for path in (ROOT / "benchmarks").rglob("*.py"):
        absolute = {
            node.module
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("benchmarks")
        }
        assert absolute == ({"benchmarks"} if path.name == "gpu_check.py" else set()), path
