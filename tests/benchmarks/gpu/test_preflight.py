"""What the preflight says, with faked tools in PATH."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.gpu import preflight as module
from benchmarks.gpu import toolchain
from benchmarks.gpu.preflight import FATAL, NOTE, OK, PROBLEM, Finding, preflight
from tests.benchmarks.gpu.fakes import executable

GPU = "NVIDIA H100, 570.86, 81559 MiB, 3 MiB, 0 %, 1980 MHz, 1980 MHz, 30, 70 W, 700 W, 0x0, Disabled"


def found(path: Path, **environment: str) -> dict[str, Finding]:
    return {f.what: f for f in preflight("cuda", {"PATH": str(path), "HOME": str(path)} | environment)}


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No tools but those in PATH."""
    monkeypatch.setattr(toolchain, "TOOLKIT", tmp_path / "no-cuda")
    monkeypatch.setattr(toolchain, "own_ptxas", lambda: None)
    monkeypatch.setattr(toolchain, "wheel_folders", list)


def test_an_empty_path_lacks_everything_and_says_what_to_do(tmp_path: Path) -> None:
    findings = found(tmp_path, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    compiler, ptxas = findings["C compiler"], findings["ptxas"]
    assert (compiler.level, compiler.found) == (PROBLEM, "neither CC nor gcc nor clang")
    assert "apt-get install gcc" in compiler.remedy
    assert (ptxas.level, ptxas.found) == (PROBLEM, "none that runs")
    assert "TRITON_PTXAS_PATH" in ptxas.remedy
    assert findings["nvcc"].level == findings["compute-sanitizer"].level == findings["ncu"].level == NOTE
    assert findings["driver"].level == NOTE
    assert all(f.remedy for f in findings.values() if f.level != OK)
    assert "what to do: " in str(compiler)


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    executable(tmp_path / "gcc", "echo 'probe.c: fatal error: crt1.o missing' >&2; exit 1")
    finding = found(tmp_path)["C compiler"]
    assert finding.level == PROBLEM
    assert "crt1.o missing" in finding.found


def test_missing_headers_of_python_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable(tmp_path / "gcc", "exit 0")
    assert found(tmp_path)["C compiler"].level == OK
    monkeypatch.setattr(module, "python_include", lambda: tmp_path / "include")
    finding = found(tmp_path)["Python.h"]
    assert finding.level == PROBLEM
    assert str(tmp_path / "include") in finding.found
    assert "-dev" in finding.remedy


def test_versions_of_ptxas_and_nvcc(tmp_path: Path) -> None:
    executable(tmp_path / "ptxas", "echo 'Cuda compilation tools, release 13.1, V13.1.80'")
    executable(tmp_path / "nvcc", "echo 'Cuda compilation tools, release 13.0, V13.0.88'")
    old = executable(tmp_path / "old" / "ptxas", "echo 'Cuda compilation tools, release 12.8, V12.8.93'")
    environment = {"PATH": str(tmp_path), "TRITON_PTXAS_PATH": str(old)}
    findings = found(tmp_path, TRITON_PTXAS_PATH=str(old))
    assert findings["ptxas"].level == OK
    assert findings["ptxas"].found == f"12.8.93 ({old}); also 13.1.80 ({tmp_path / 'ptxas'})"
    assert findings["nvcc"].found == f"13.0.88 ({tmp_path / 'nvcc'})"
    assert toolchain.other_ptxas(environment) == (str(tmp_path / "ptxas"), "13.1.80")
    assert toolchain.tool_versions(environment)["ptxas"] == f"12.8.93 ({old})"


def test_a_ptxas_path_that_does_not_run_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = executable(tmp_path / "own", "echo 'V12.8.93'")
    monkeypatch.setattr(toolchain, "own_ptxas", lambda: own)
    finding = found(tmp_path, TRITON_PTXAS_PATH=str(tmp_path / "none"))["ptxas"]
    assert finding.level == PROBLEM
    assert "does not run" in finding.found
    assert found(tmp_path)["ptxas"].level == OK


def test_driver_and_other_programs(tmp_path: Path) -> None:
    executable(tmp_path / "nvidia-smi", f'case "$1" in --query-compute*) echo "41, 900 MiB";; *) echo "{GPU}";; esac')
    findings = found(tmp_path)
    assert "driver_version 570.86" in findings["driver"].found
    assert "41, 900 MiB" in findings["other programs"].found
    assert toolchain.tool_versions({"PATH": str(tmp_path)})["driver"] == "570.86"


def test_tools_in_path_are_found(tmp_path: Path) -> None:
    for name in ("ncu", "compute-sanitizer"):
        executable(tmp_path / name, "exit 0")
    findings = found(tmp_path)
    assert findings["compute-sanitizer"].level == OK
    assert str(tmp_path / "ncu") in findings["ncu"].found


def test_a_package_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None if name in ("torch", "numpy") else find_spec(name))
    findings = found(tmp_path)
    assert findings["torch"].level == findings["GPU"].level == FATAL
    assert findings["numpy"].level == NOTE


def test_the_cpu_needs_no_gpu_tools() -> None:
    assert {f.what for f in preflight("cpu", {"PATH": ""})} == {"Python", "torch", "triton", "numpy"}


def test_variables_that_matter_are_recorded() -> None:
    given = {"DISABLE_MMA_V3": "1", "TRITON_PTXAS_PATH": "p", "CC": "gcc", "HOME": "/root", "NVIDIA_API_KEY": "secret"}
    assert toolchain.relevant(given) == {"CC": "gcc", "DISABLE_MMA_V3": "1", "TRITON_PTXAS_PATH": "p"}
