"""The real command, killed: what is started again ends as if nobody had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from msformer.training import checkpoint
from tests.msformer.training.small import OPTIONS, save_lesions

EVERY = int(os.environ.get("MSFORMER_TEST_EVERY", "3"))
"""Which of the points a training is killed at; `make kills` takes each."""
SCRIPT = Path(__file__).with_name("dying.py")
ROOT = Path(__file__).parents[3]


def started(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=variables, timeout=600)


def left(folder: Path) -> dict[str, Any]:
    """All that a training left, but for times and what the folder is called."""
    description = json.loads((folder / "model.json").read_text())
    description["training"] |= {"seconds": None, "processes": None}
    state = torch.load(folder / checkpoint.CHECKPOINT, weights_only=True)
    return {
        "files": sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")),
        "weights": (folder / "model.safetensors").read_bytes(),
        "description": description,
        "history": state["history"],
        "over": 'http-equiv="refresh"' not in (folder / "report.html").read_text(),
    }


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed") / "images"
    save_lesions(folder, 2)
    return folder


@pytest.mark.slow(20)
@pytest.mark.timeout(600)
def test_killed_wherever_it_writes(images: Path, tmp_path: Path) -> None:
    """And before some of the steps: always the files of a training that nobody stopped, with the same bits."""
    done = started([str(SCRIPT), "each", str(tmp_path), str(EVERY), str(images), *OPTIONS])
    assert done.returncode == 0, done.stderr
    names = done.stdout.split()
    assert {name.split("-")[0] for name in names} == {"die_at_step", "die_at_rename", "die_at_write"}
    assert len(names) >= 3 + 9 // EVERY
    expected = left(tmp_path / "whole")
    assert expected["over"]
    assert len(expected["history"]["ce"]) == 20
    for name in names:
        assert left(tmp_path / name) == expected, name


@pytest.mark.slow(45)
def test_processes_that_torchrun_starts_again(images: Path, tmp_path: Path) -> None:
    """Two processes, of which one dies half-way: they go on from the last checkpoint, and end where one alone ends."""
    alone = started([str(SCRIPT), "0", "-1", str(images), "--out", str(tmp_path / "alone"), *OPTIONS])
    assert alone.returncode == 0, alone.stderr
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command = ["0", "15", str(images), "--out", str(tmp_path / "both"), *OPTIONS, "--overwrite"]
    both = started([*launch, *meeting, str(SCRIPT), *command])
    assert both.returncode == 0, both.stderr
    assert "goes on after step 10" in both.stdout
    assert "error: another process of the training failed, or was killed" in both.stderr
    assert both.stdout.count("model in ") == 1
    found, expected = left(tmp_path / "both"), left(tmp_path / "alone")
    assert found["over"]
    for name, values in expected["history"].items():
        torch.testing.assert_close(torch.tensor(found["history"][name]), torch.tensor(values), rtol=1e-3, atol=1e-4)
