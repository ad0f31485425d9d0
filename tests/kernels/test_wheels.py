"""The wheels: which interpreters they are built for, and that their bytes do not depend on where they are built."""

from __future__ import annotations

import os
import stat
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "csrc"))
import wheels  # noqa: E402


def interpreter(path: Path, answer: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{answer}'\n")
    path.chmod(0o755)
    return path


def test_interpreters_are_those_that_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """pyenv puts a python3.12 on PATH that fails unless the version is chosen."""
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert wheels.find_python("3.99") is None
    interpreter(tmp_path / "bin/python3.99", "not installed")
    assert wheels.find_python("3.99") is None
    free_threaded = interpreter(tmp_path / "pyenv/versions/3.99.2/bin/python", "(3, 99) 1")
    assert wheels.find_python("3.99") is None, "which cannot load the module of one with a GIL"
    real = interpreter(tmp_path / "pyenv/versions/3.99.1/bin/python", "(3, 99) 0")
    assert free_threaded.exists()
    assert wheels.find_python("3.99") == str(real)


def test_a_wheel_has_the_same_bytes_after_any_checkout(tmp_path: Path) -> None:
    found = []
    for number, mode in enumerate((0o644, 0o600)):
        path = tmp_path / str(number) / "a-1-cp399-cp399-manylinux_2_17_x86_64.whl"
        path.parent.mkdir()
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("a/_a.cpython-399.so", "a/b.py"):
                entry = zipfile.ZipInfo(name, (2026, 1, 2, 3, 4, 6))
                entry.external_attr = (stat.S_IFREG | mode) << 16
                archive.writestr(entry, b"content")
        copy = wheels.normalized(path, tmp_path / f"out{number}")
        found.append(copy.read_bytes())
        assert os.listdir(copy.parent) == [path.name]
    assert found[0] == found[1]


def test_the_build_is_told_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.setenv("MSFORMER_EMULATE_TILES", "1")
    told = wheels.environment("aarch64", "3.12")
    assert "-target aarch64-linux-gnu.2.17" in told["CXX"]
    assert told["SETUPTOOLS_EXT_SUFFIX"] == ".cpython-312-aarch64-linux-gnu.so"
    assert told["SOURCE_DATE_EPOCH"] == "1700000000"
    assert "MSFORMER_EMULATE_TILES" not in told, "variants for tests have no place in a wheel"


def test_without_git_there_is_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert wheels.time_of_commit() == str(wheels.EARLIEST)


def test_a_wheel_that_needs_more_than_its_name_promises_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shown = interpreter(
        tmp_path / "auditwheel", 'is consistent with the following platform tag: "manylinux_2_34_x86_64".'
    )
    monkeypatch.setattr(wheels.sys, "executable", str(shown))
    with pytest.raises(SystemExit, match="not what its name promises"):
        wheels.check(tmp_path / "a-1-cp312-cp312-manylinux_2_17_x86_64.whl")
    interpreter(shown, 'is consistent with the following\n platform tag:\n "manylinux_2_17_x86_64".')
    wheels.check(tmp_path / "a-1-cp312-cp312-manylinux_2_17_x86_64.whl")
