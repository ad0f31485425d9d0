"""The command, and that its file does not hide the function of the same name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from msformer_kernels.patching import command

MADE = """
import torch
from tests.kernels.patching.models.mix_ffns import ImageMixFFN, LongerMixFFN

def model():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), ImageMixFFN(), LongerMixFFN())

def with_inputs():
    return ImageMixFFN().double(), torch.randn(1, 8, 5, 7, dtype=torch.float64)

number = lambda: 3
one = ImageMixFFN()

def with_size(size):
    return one

def fails():
    raise ValueError("of the user")
"""


ROOT = Path(__file__).resolve().parents[3]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "made.py").write_text(MADE)
    command = [sys.executable, "-m", "msformer_kernels.patch", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)


def test_it_prints_the_report_and_times(tmp_path: Path) -> None:
    found = run(tmp_path, "made:model", "--shape", "1,3,6,5", "--min-gain", "0", "--samples", "1")
    assert found.returncode == 0, found.stderr
    assert found.stderr == ""
    assert re.search(r"^  1 +ImageMixFFN +mix_ffn +gelu_tanh +\de-1\d$", found.stdout, re.M)
    assert "LongerMixFFN: 2: MixFFN has 2 pointwise layers" in found.stdout
    assert "inputs (1, 3, 6, 5)" in found.stdout
    for row in ("forward", r"forward \+ backward"):
        assert re.search(rf"^  {row} +[\d.]+ ms +[\d.]+ ms +[\d.]+ x +\S+( MiB)? +\S+( MiB)?$", found.stdout, re.M)


def test_inputs_come_from_the_callable_and_times_can_be_left_out(tmp_path: Path) -> None:
    found = run(tmp_path, "made:with_inputs", "--samples", "0", "--min-gain", "1e-9")
    assert found.returncode == 0, found.stderr
    assert "x with backward" in found.stdout
    assert "times" not in found.stdout


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("made", "expected MODULE:CALLABLE, got 'made'"),
        ("made:number", "expected it to return a torch.nn.Module, got int"),
        ("made:nothing", "has no attribute 'nothing'"),
        ("no_such_module:model", "No module named 'no_such_module'"),
        ("made:MADE_BY", "has no attribute 'MADE_BY'"),
        ("made:__name__", "expected something to be called, got 'made'"),
        ("made:with_size", "expected that it takes no arguments, missing a required argument: 'size'"),
        ("made:one", "made:one: a call with (1, 3, 512, 512) torch.float32 fails (see --shape): RuntimeError: Given"),
    ],
)
def test_wrong_targets_are_errors(
    target: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "made.py").write_text(MADE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit):
        command.main([target])
    assert reason in capsys.readouterr().err


def test_a_model_is_taken_as_it_is_and_the_users_errors_go_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "made.py").write_text(MADE)
    monkeypatch.chdir(tmp_path)
    command.main(["made:one", "--shape", "1,8,5,7", "--min-gain", "0", "--samples", "0"])
    assert "replaced: 1" in capsys.readouterr().out
    with pytest.raises(ValueError, match="of the user"):
        command.main(["made:fails"])
    with pytest.raises(SystemExit):
        command.main(["made:one", "--shape", "1,8,-5,7"])
    assert "--shape: expected whole numbers with commas between them, got '1,8,-5,7'" in capsys.readouterr().err


def test_importing_the_file_of_the_command_keeps_the_function() -> None:
    code = (
        "import msformer_kernels as k; before = k.patch; import msformer_kernels.patch; "
        "from msformer_kernels import patch; assert before is patch is k.patch is msformer_kernels.patch; "
        "assert callable(patch) and patch.__doc__; print('same')"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "same\n"
