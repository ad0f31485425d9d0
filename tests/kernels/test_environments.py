"""The accuracy tests once more, in other environments: what other processors, libraries and settings make of them.

Each environment is a process of its own: the CPU variants that this machine has, other kernels under eager PyTorch
(which ours are compared with), other BLAS kernels under Triton's interpreter, other numbers of threads, other inputs.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import msformer_kernels as kernels

ROOT = Path(__file__).resolve().parents[2]
NATIVE = {
    "plain variant, ATen default, 1 thread, seed 1": {
        "MSFORMER_CPU_ISA": "plain",
        "ATEN_CPU_CAPABILITY": "default",
        "OMP_NUM_THREADS": "1",
        "MSFORMER_TEST_SEED": "1",
    },
    "avx2 variant, ATen avx2, oneDNN AVX2, 2 threads, seed 2": {
        "MSFORMER_CPU_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "OMP_NUM_THREADS": "2",
        "MSFORMER_TEST_SEED": "2",
    },
    "avx512 variant, oneDNN SSE41, 1 thread, seed 2": {
        "MSFORMER_CPU_ISA": "avx512",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "OMP_NUM_THREADS": "1",
        "MSFORMER_TEST_SEED": "2",
    },
    "avx512_bf16 variant, ATen default, 2 threads, seed 1": {
        "MSFORMER_CPU_ISA": "avx512_bf16",
        "ATEN_CPU_CAPABILITY": "default",
        "OMP_NUM_THREADS": "2",
        "MSFORMER_TEST_SEED": "1",
    },
    "amx variant, 2 threads, seed 1": {
        "MSFORMER_CPU_ISA": "amx",
        "OMP_NUM_THREADS": "2",
        "MSFORMER_TEST_SEED": "1",
    },
    "emulated tiles, 2 threads, seed 2": {
        "MSFORMER_CPU_ISA": "emulated_tiles",
        "OMP_NUM_THREADS": "2",
        "MSFORMER_TEST_SEED": "2",
    },
}
DTYPES = {"avx512_bf16": "bf16 and not precision", "amx": "(f32 or bf16)", "emulated_tiles": "(f32 or bf16)"}
"""That a variant does in a way of its own, unless it is float32 alone; less precise float32 is for tiles."""
INTERPRETER = {
    "OpenBLAS Haswell, ATen default, seed 1": {
        "OPENBLAS_CORETYPE": "Haswell",
        "ATEN_CPU_CAPABILITY": "default",
        "MSFORMER_TEST_SEED": "1",
    },
    "OpenBLAS SkylakeX, ATen avx2, seed 2": {
        "OPENBLAS_CORETYPE": "SkylakeX",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MSFORMER_TEST_SEED": "2",
    },
}


def run_accuracy_tests(environment: dict[str, str], expression: str, effort: float) -> None:
    """Fails with the output of the tests where one fails, or where none ran."""
    variables = {**os.environ, **environment, "MSFORMER_TEST_EFFORT": str(effort)}
    variables.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "accuracy"]
    command += ["-k", expression, "tests/kernels/ops"]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert " passed" in done.stdout


def has_avx512() -> bool:
    try:
        return "avx512f" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


@pytest.mark.slow(25)
@pytest.mark.parametrize("name", list(NATIVE))
def test_native_kernels(name: str) -> None:
    if "native" not in kernels.available_backends():
        pytest.skip("the extension was not built")
    from msformer_kernels import _native

    if NATIVE[name]["MSFORMER_CPU_ISA"] not in _native.available_isas():
        pytest.skip("this machine does not have the variant")
    dtypes = DTYPES.get(NATIVE[name]["MSFORMER_CPU_ISA"], "f32 and not precision")
    run_accuracy_tests(NATIVE[name], f"native and {dtypes}", effort=0.25)


@pytest.mark.slow(10)
@pytest.mark.parametrize("name", list(INTERPRETER))
def test_triton_kernels_in_the_interpreter(name: str) -> None:
    """NumPy multiplies there, by the BLAS kernels that it has for the processor."""
    pytest.importorskip("triton")
    if platform.machine().lower() not in ("x86_64", "amd64") or ("SkylakeX" in name and not has_avx512()):
        pytest.skip("this processor does not run these BLAS kernels")
    some = "norm_residual or heads or masked or cross or skip_norms or segformer"
    run_accuracy_tests(INTERPRETER[name], f"triton and f32 and ({some})", effort=0.25)
