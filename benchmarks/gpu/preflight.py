"""What this machine has and lacks, before anything is run on it. Needs the standard library alone.

Each finding says what was found and, if that is a problem, what to do about it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .toolchain import (
    cuda_version,
    find_compiler,
    find_cuda_tool,
    find_nvcc,
    find_ptxas,
    first_line,
    gpu_state,
    output,
    package_version,
    ptxas_in_use,
    python_include,
    which,
)

OK, NOTE, PROBLEM, FATAL = "ok", "note", "PROBLEM", "FATAL"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    level: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.level:<8}{self.what}: {self.found}"
        return f"{text}\n        what to do: {self.remedy}" if self.remedy else text


def preflight(device: str, environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """All findings; those about the GPU and its compilers only for a GPU."""
    found = [_python(), _package("torch", FATAL, "pip install torch"), _package("triton", PROBLEM, _INSTALL_TRITON)]
    found.append(_package("numpy", NOTE, "pip install numpy (the fit of an image needs it, and Triton's interpreter)"))
    if device == "cpu":
        return found
    found += [_gpu(), *_driver(environment), _libcuda(), _compiler(environment), _ptxas(environment)]
    found += [_nvcc(environment), _sanitizer(environment), _nsight_compute(environment), _cache(environment)]
    return found


_INSTALL_TRITON = "pip install triton (it comes with torch on Linux; without it there are no Triton kernels)"


def _python() -> Finding:
    return Finding("Python", OK, f"{sys.version.split()[0]} ({sys.executable})")


def _package(name: str, level: str, remedy: str) -> Finding:
    if find_spec(name) is None:
        return Finding(name, level, "not installed", remedy)
    return Finding(name, OK, package_version(name))


def _gpu() -> Finding:
    if find_spec("torch") is None:
        return Finding("GPU", FATAL, "not looked for, as torch is not installed", "pip install torch")
    import torch

    if torch.cuda.is_available():
        return Finding("GPU", OK, f"{torch.cuda.device_count()} that torch can use")
    if torch.version.cuda is None and torch.version.hip is None:
        return Finding("GPU", FATAL, f"torch {torch.__version__} is a build for the CPU", "pip install torch with CUDA")
    try:
        torch.cuda.init()
        reason = "torch finds none"
    except (RuntimeError, AssertionError) as error:
        reason = first_line(str(error))
    remedy = "run where nvidia-smi shows a GPU (in a container: --gpus all), with a driver new enough for this torch"
    return Finding("GPU", FATAL, reason, remedy)


def _driver(environment: Mapping[str, str]) -> list[Finding]:
    state = gpu_state(environment)
    if not state:
        return [Finding("driver", NOTE, "nvidia-smi is not there or says nothing", "add nvidia-smi to PATH")]
    text = ", ".join(f"{k} {v}" for k, v in state.items())
    found = [Finding("driver", OK, text)]
    tool = which("nvidia-smi", environment)
    others = output([str(tool), "--query-compute-apps=pid,used_memory", "--format=csv,noheader"]).strip()
    if others:
        remedy = "end them, or do not rely on the times"
        found.append(Finding("other programs", NOTE, f"on the GPU: {'; '.join(others.splitlines())}", remedy))
    return found


def _libcuda() -> Finding:
    text = output(["/sbin/ldconfig", "-p"])
    places = [line.split()[-1] for line in text.splitlines() if "libcuda.so.1" in line]
    given = [os.environ["TRITON_LIBCUDA_PATH"]] if "TRITON_LIBCUDA_PATH" in os.environ else []
    folders = [*given, *os.environ.get("LD_LIBRARY_PATH", "").split(":")]
    places += [f"{f}/libcuda.so.1" for f in folders if f and Path(f, "libcuda.so.1").exists()]
    if places:
        return Finding("libcuda.so.1", OK, places[0])
    remedy = "run ldconfig, or set TRITON_LIBCUDA_PATH to the folder of libcuda.so.1: Triton links its launchers to it"
    return Finding("libcuda.so.1", PROBLEM, "ldconfig does not know it", remedy)


def _compiler(environment: Mapping[str, str]) -> Finding:
    """Compiles what Triton compiles for each kernel: a C module of Python."""
    compiler = find_compiler(environment)
    install = "apt-get install gcc libc6-dev, or set CC: Triton and torch.compile compile a launcher for each kernel"
    if compiler is None:
        return Finding("C compiler", PROBLEM, "neither CC nor gcc nor clang", install)
    include = python_include()
    if not (include / "Python.h").exists():
        name = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        remedy = f"apt-get install {name} (or python-devel), or use a Python that brings its headers"
        return Finding("Python.h", PROBLEM, f"not in {include}", remedy)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.c"
        source.write_text("#include <Python.h>\nint probe(void) { return PY_MAJOR_VERSION; }\n")
        command = [*compiler.split(), str(source), "-shared", "-fPIC", f"-I{include}", "-o", f"{folder}/probe.so"]
        failure = _failure(command, environment)
    if failure:
        return Finding("C compiler", PROBLEM, f"{compiler} does not compile a module of Python: {failure}", install)
    return Finding("C compiler", OK, f"{compiler}, with Python.h in {include}")


def _ptxas(environment: Mapping[str, str]) -> Finding:
    used, given = ptxas_in_use(environment), environment.get("TRITON_PTXAS_PATH")
    if used is None:
        remedy = "reinstall triton, or set TRITON_PTXAS_PATH to a ptxas: nothing can be compiled for the GPU"
        return Finding("ptxas", PROBLEM, "none that runs", remedy)
    others = ", ".join(f"{number} ({path})" for path, number in find_ptxas(environment).items() if path != used[0])
    text = f"{used[1]} ({used[0]})" + (f"; also {others}" if others else "")
    if given and given != used[0]:
        return Finding("ptxas", PROBLEM, f"TRITON_PTXAS_PATH={given} does not run; {text}", "correct or unset it")
    return Finding("ptxas", OK, text)


def _nvcc(environment: Mapping[str, str]) -> Finding:
    path = find_nvcc(environment)
    if path is None:
        return Finding("nvcc", NOTE, "not there; only kernels in CUDA C++ need it", "set CUDA_HOME or CUDACXX")
    return Finding("nvcc", OK, f"{cuda_version(path)} ({path})")


def _sanitizer(environment: Mapping[str, str]) -> Finding:
    path = find_cuda_tool("compute-sanitizer", environment)
    if path is None:
        return Finding("compute-sanitizer", NOTE, "not there: memory is not checked", "install cuda-sanitizer")
    return Finding("compute-sanitizer", OK, path)


def _nsight_compute(environment: Mapping[str, str]) -> Finding:
    path = find_cuda_tool("ncu", environment)
    if path is None:
        return Finding("ncu", NOTE, "not there: kernels are not profiled", "install Nsight Compute")
    try:
        restricted = "RmProfilingAdminOnly: 1" in Path("/proc/driver/nvidia/params").read_text()
    except OSError:
        restricted = False
    if restricted and os.geteuid() != 0:
        return Finding("ncu", NOTE, f"{path}, but the driver lets only root profile", NCU_PERMISSION)
    return Finding("ncu", OK, path)


NCU_PERMISSION = (
    "run as root (in a container: --cap-add=SYS_ADMIN), or load the driver with NVreg_RestrictProfilingToAdminUsers=0"
)


def _cache(environment: Mapping[str, str]) -> Finding:
    folder = Path(environment.get("TRITON_CACHE_DIR") or Path(environment.get("TRITON_HOME", Path.home()), ".triton"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free / 2**30
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Finding("Triton's cache", PROBLEM, f"{folder}: {error.strerror}", "set TRITON_CACHE_DIR")
    if free < 2:
        return Finding(
            "Triton's cache", PROBLEM, f"{folder}: {free:.1f} GiB free", "make room, or set TRITON_CACHE_DIR"
        )
    return Finding("Triton's cache", OK, f"{folder}, {free:.0f} GiB free")


def _failure(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """The first error that a command prints; empty where it succeeds."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=60, check=False, env=dict(environment)
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
    return (lines or [f"exit code {done.returncode}"])[0] if done.returncode else ""
