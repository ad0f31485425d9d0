"""The build of the extensions: which nvcc and architectures it takes, and what an install does without them."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "csrc"))
import toolchain  # noqa: E402
from extensions import EXTENSIONS, supported_variants  # noqa: E402
from toolchain import BuildFailed, NotBuilt, Object, cuda_architectures, find_nvcc, run_ninja  # noqa: E402


def program(path: Path, script: str = "") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an nvcc, wherever this machine has one."""
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "MSFORMER_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "path", ["/nowhere"])
    monkeypatch.setattr(toolchain, "DEFAULT_TOOLKIT", "/nowhere")
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: "/nowhere")


@pytest.mark.usefixtures("nowhere")
def test_where_nvcc_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each place comes before those that were added earlier."""
    with pytest.raises(NotBuilt, match=r"no nvcc.*CUDACXX, CUDA_HOME, CUDA_PATH, PATH nor .*install nvidia-cuda-nvcc"):
        find_nvcc()
    hidden = program(tmp_path / "real/nvidia/cu13/bin/nvcc")
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: str(tmp_path / "real"))
    assert find_nvcc() == hidden, "which an isolated build does not have in sys.path"
    older = program(tmp_path / "site/nvidia/cuda_nvcc/bin/other")
    package = program(tmp_path / "site/nvidia/cu13/bin/nvcc")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    assert Path(older).exists()
    assert find_nvcc() == package
    usual = program(tmp_path / "cuda/nvcc")
    monkeypatch.setattr(toolchain, "DEFAULT_TOOLKIT", str(tmp_path / "cuda"))
    assert find_nvcc() == usual
    on_path = program(tmp_path / "path/nvcc")
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert find_nvcc() == on_path
    for name in ("CUDA_PATH", "CUDA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "no-toolkit"))
        assert find_nvcc() == on_path
        home = program(tmp_path / name / "bin/nvcc")
        monkeypatch.setenv(name, str(tmp_path / name))
        assert find_nvcc() == home
        on_path = home
    named = program(tmp_path / "mine/my-nvcc")
    monkeypatch.setenv("CUDACXX", named)
    assert find_nvcc() == named
    monkeypatch.setenv("CUDACXX", str(tmp_path / "gone"))
    with pytest.raises(BuildFailed, match=r"CUDACXX names .*gone, which is no program"):
        find_nvcc()


def test_windows_is_not_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(NotBuilt, match="not built on Windows") as caught:
        toolchain.find_compiler()
    assert not isinstance(caught.value, BuildFailed), "which would be warned about, and no compiler would help"


def test_a_compiler_for_another_processor_gets_the_variant_that_runs_anywhere(tmp_path: Path) -> None:
    compiler = program(tmp_path / "c++", 'case "$*" in *-m*|*immintrin*) exit 1;; esac')
    assert [variant.name for variant in supported_variants([compiler], tmp_path)] == ["plain"]


def test_wheels_can_leave_cuda_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MSFORMER_CUDA", "0")
    with pytest.raises(NotBuilt, match=r"MSFORMER_CUDA=0.*--no-binary msformer") as caught:
        EXTENSIONS["_cuda"].build(tmp_path / "x.so", tmp_path)
    assert not isinstance(caught.value, BuildFailed)


@pytest.mark.usefixtures("nowhere")
def test_architectures_are_those_that_nvcc_knows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvcc = program(tmp_path / "nvcc", "printf 'sm_75\\nsm_80\\nsm_86\\nsm_89\\nsm_90\\nsm_90a\\n'")
    assert cuda_architectures(nvcc) == (80, 89, 90)
    monkeypatch.setenv("MSFORMER_CUDA_ARCHS", "90, 86")
    assert cuda_architectures(nvcc) == (86, 90)
    for wrong in ("75", "120", "sm_90", "90+PTX", ","):
        monkeypatch.setenv("MSFORMER_CUDA_ARCHS", wrong)
        with pytest.raises(BuildFailed, match="MSFORMER_CUDA_ARCHS: expected numbers of 80, 86, 89, 90, with commas"):
            cuda_architectures(nvcc)
    monkeypatch.delenv("MSFORMER_CUDA_ARCHS")
    with pytest.raises(BuildFailed, match="none of the architectures 80, 89"):
        cuda_architectures(program(tmp_path / "old-nvcc", "echo sm_75"))
    with pytest.raises(BuildFailed, match="names no architecture: unknown option"):
        cuda_architectures(program(tmp_path / "older-nvcc", "echo unknown option >&2; exit 1"))


def test_the_reason_of_a_failed_build_is_the_compilers_error(tmp_path: Path) -> None:
    pytest.importorskip("ninja")
    compiler = program(tmp_path / "compiler", "echo 'x.cu(3): error: no such thing'; exit 1")
    objects = [Object("x.o", Path(__file__), [compiler])]
    with pytest.raises(BuildFailed, match=r"compiler failed: x.cu\(3\): error: no such thing"):
        run_ninja(tmp_path / "x.so", tmp_path / "build", objects, [compiler, "-shared"])


def setup_py(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """setup.py with compilers that always fail, in a copy of its own of what it writes."""
    broken = {"CXX": program(folder / "no-compiler", "exit 1"), "CUDACXX": str(folder / "no-nvcc")}
    others = {k: v for k, v in os.environ.items() if not k.startswith("MSFORMER_")}
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(folder), "build", "--build-base",
         str(folder / "build"), *command],
        cwd=ROOT, env={**others, **broken, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_wheel_without_compilers_says_what_it_lacks(tmp_path: Path) -> None:
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip("the build needs setuptools 77 or newer")
    done = setup_py(tmp_path, "bdist_wheel", "--dist-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "installed")
    package = tmp_path / "installed/msformer_kernels"
    assert not list(package.glob("*.so"))
    assert {path.name for path in package.glob("_*")} == {
        "__init__.py", "_cuda_error.txt", "_cuda_emulated_error.txt", "_native.pyi", "_native_error.txt"
    }  # fmt: skip
    code = """
from msformer_kernels import explain
print(explain().reasons["native"])
print(explain("cuda").reasons["cuda"])
"""
    # without site: an editable install would find its own extensions
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "installed"), *sys.path])}
    shown = subprocess.run(
        [sys.executable, "-S", "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    native, cuda = shown.stdout.splitlines()
    assert "msformer_kernels._native is not available: " in native
    assert f"msformer_kernels._cuda is not available: CUDACXX names {tmp_path / 'no-nvcc'}, which is no program" in cuda


@pytest.mark.parametrize(
    ("environment", "missing"),
    [
        ({"MSFORMER_REQUIRE_NATIVE": "1"}, "_native"),
        ({"MSFORMER_REQUIRE_CUDA": "1"}, "_cuda"),
    ],
    ids=["native", "cuda"],
)
def test_a_required_extension_must_be_built(environment: dict[str, str], missing: str, tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    done = setup_py(tmp_path, "build_ext", **environment)
    assert done.returncode != 0
    assert "BuildFailed" in done.stderr
    assert not list(tmp_path.rglob(f"{missing}_error.txt"))


@pytest.mark.parametrize(("native", "emulate", "required"), [("1", "1", True), ("1", "", False), ("", "1", False)])
def test_the_emulation_is_required_where_it_is_wanted(
    native: str, emulate: str, required: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MSFORMER_REQUIRE_NATIVE", native)
    monkeypatch.setenv("MSFORMER_CUDA_EMULATE", emulate)
    assert EXTENSIONS["_cuda_emulated"].is_required() is required


def test_the_emulation_is_built_where_it_is_wanted_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MSFORMER_CUDA_EMULATE", raising=False)
    with pytest.raises(NotBuilt, match="MSFORMER_CUDA_EMULATE=1 is in the environment") as caught:
        EXTENSIONS["_cuda_emulated"].build(tmp_path / "x.so", tmp_path)
    assert not isinstance(caught.value, BuildFailed), "which would be warned about"
