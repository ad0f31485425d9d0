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

FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O0", "-g1")  # compiled in less time
pytestmark = pytest.mark.skipif(
    not os.environ.get("MSFORMER_TEST_SANITIZERS"), reason="the build takes a minute: make sanitize"
)


def runtime(compiler: list[str], library: str) -> str:
    """Where the library of a sanitizer is, which Python does not bring along; skips where there is none."""
    found = subprocess.run(
        [*compiler, f"-print-file-name={library}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"{compiler[0]} has no {library}")
    return found


@pytest.fixture
def sanitized(tmp_path: Path) -> Callable[[str], subprocess.CompletedProcess[str]]:
    for package in ("pybind11", "ninja"):
        pytest.importorskip(package)
    try:
        compiler = find_compiler()
    except BuildFailed as error:
        pytest.skip(str(error))
    libraries = [runtime(compiler, library) for library in ("libasan.so", "libubsan.so")]
    build_emulation(tmp_path / "emulated.so", tmp_path / "build", *FLAGS)
    # Python does not free everything at its end
    environment = {**os.environ, "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}

    def run(what: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tests.kernels.cuda.sanitized", str(tmp_path / "emulated.so"), what]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.mark.timeout(600)
def test_operators_and_a_read_beyond_a_tensor(sanitized: Callable[[str], subprocess.CompletedProcess[str]]) -> None:
    """In one test, for the build takes a minute: no false alarm, and an alarm."""
    done = sanitized("operators")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    lines = done.stdout.splitlines()
    served = [name for name, operator in OPERATORS.items() if "cuda" in operator.served_by]
    for name in served:
        for dtype, least in (("bfloat16", 10), ("float16", 4), ("float32", 20), ("float32 tf32", 10)):
            assert sum(line.startswith(f"{name} ") and f".{dtype}" in line for line in lines) >= least, (name, dtype)
    done = sanitized("beyond")
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "msformer::gpu" in done.stderr
