"""The CUDA kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in their emulation (sanitized.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from msformer_kernels.core.operator import OPERATORS

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "csrc"))
from extensions import build_emulation  # noqa: E402
from toolchain import BuildFailed, find_compiler  # noqa: E402

FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O0")  # compiled in a quarter of the time
pytestmark = pytest.mark.slow


def runtime(compiler: list[str], library: str) -> str:
    """Where the library of a sanitizer is, which Python does not bring along; skips where there is none."""
    found = subprocess.run(
        [*compiler, f"-print-file-name={library}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"{compiler[0]} has no {library}")
    return found


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], subprocess.CompletedProcess[str]]:
    for package in ("pybind11", "ninja"):
        pytest.importorskip(package)
    try:
        compiler = find_compiler()
    except BuildFailed as error:
        pytest.skip(str(error))
    libraries = [runtime(compiler, library) for library in ("libasan.so", "libubsan.so")]
    folder = tmp_path_factory.mktemp("sanitized")
    build_emulation(folder / "emulated.so", folder / "build", *FLAGS)
    # Python does not free everything at its end
    environment = {**os.environ, "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}

    def run(what: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tests.kernels.cuda.sanitized", str(folder / "emulated.so"), what]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    return run


def test_operators(sanitized: Callable[[str], subprocess.CompletedProcess[str]]) -> None:
    done = sanitized("operators")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    lines = done.stdout.splitlines()
    served = [name for name, operator in OPERATORS.items() if "cuda" in operator.served_by]
    for name in served:
        for dtype in ("bfloat16", "float16", "float32", "tf32"):
            assert sum(line.startswith(f"{name} ") and dtype in line for line in lines) > 5


def test_a_read_beyond_a_tensor_is_found(sanitized: Callable[[str], subprocess.CompletedProcess[str]]) -> None:
    done = sanitized("beyond")
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "msformer::gpu" in done.stderr
