"""What compiles and runs kernels here, where it is and of which version. Needs the standard library alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

TOOLKIT, NSIGHT_COMPUTE = Path("/usr/local/cuda"), Path("/opt/nvidia/nsight-compute")
_PREFIXES = ("TRITON_", "DISABLE_MMA", "PTXAS_", "TORCH", "PYTORCH_", "CUDA", "MSFORMER_", "CUBLAS", "OMP_")
_NAMES = ("CC", "CXX", "CUDACXX", "LD_LIBRARY_PATH", "DISABLE_PTXAS_OPT", "NVIDIA_TF32_OVERRIDE")


def relevant(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that change what is compiled or run."""
    return {k: v for k, v in sorted(environment.items()) if k.startswith(_PREFIXES) or k in _NAMES}


def tool_versions(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Versions of what compiles and runs the kernels; "none" where there is nothing."""
    used = ptxas_in_use(environment)
    nvcc = find_nvcc(environment)
    commit = output(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"])
    return {
        "driver": gpu_state(environment).get("driver_version", "none"),
        "ptxas": f"{used[1]} ({used[0]})" if used else "none",
        "nvcc": f"{cuda_version(nvcc)} ({nvcc})" if nvcc else "none",
        "compiler": first_line(output([find_compiler(environment) or "cc", "--version"])) or "none",
        "torch": package_version("torch"),
        "triton": package_version("triton"),
        "python": sys.version.split()[0],
        "commit": commit.strip() or "unknown (no git checkout)",
    }


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


_STATE = (
    "name", "driver_version", "memory.total", "memory.used", "utilization.gpu", "clocks.sm", "clocks.max.sm",
    "temperature.gpu", "power.draw", "power.limit", "clocks_event_reasons.active", "mig.mode.current",
)  # fmt: skip


def gpu_state(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What nvidia-smi says of the first GPU now; empty without it."""
    tool = which("nvidia-smi", environment)
    if tool is None:
        return {}
    for names in (_STATE, ("name", "driver_version")):  # older drivers know fewer names
        text = output([tool, f"--query-gpu={','.join(names)}", "--format=csv,noheader"])
        values = [value.strip() for value in first_line(text).split(",")]
        if len(values) == len(names):
            return dict(zip(names, values, strict=True))
    return {}


def find_compiler(environment: Mapping[str, str] = os.environ) -> str | None:
    """The C compiler that Triton takes."""
    return environment.get("CC") or which("gcc", environment) or which("clang", environment)


def python_include() -> Path:
    """Where Triton looks for Python.h."""
    scheme = sysconfig.get_default_scheme()
    paths = sysconfig.get_paths(scheme="posix_prefix" if scheme == "posix_local" else scheme)
    return Path(paths["include"])


def cuda_version(path: str) -> str | None:
    """The version of ptxas or nvcc, such as 12.8.93; None where it does not run."""
    match = re.search(r"V(\d+\.\d+\.\d+)", output([path, "--version"]))
    return match[1] if match else None


def _as_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def own_ptxas() -> Path | None:
    """That of Triton's package."""
    spec = find_spec("triton")
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "ptxas" if spec and spec.origin else None


def wheel_folders() -> list[Path]:
    """Of the packages that bring parts of the CUDA toolkit, such as nvidia-cuda-nvcc."""
    spec = find_spec("nvidia")
    roots = spec.submodule_search_locations or [] if spec else []
    return [folder for root in roots for folder in Path(root).glob("*")]


def find_ptxas(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Every ptxas that is there, with its version; that of Triton, which is the default, first."""
    own = own_ptxas()
    roots = [environment.get("CUDA_HOME"), environment.get("CUDA_PATH"), TOOLKIT, *wheel_folders()]
    paths = [str(own) if own else None, environment.get("TRITON_PTXAS_PATH"), which("ptxas", environment)]
    paths += [f"{root}/bin/ptxas" for root in roots if root]
    found = {}
    for path in paths:
        if path and path not in found and (number := cuda_version(path)):
            found[path] = number
    return found


def ptxas_in_use(environment: Mapping[str, str] = os.environ) -> tuple[str, str] | None:
    """Path and version of the ptxas that Triton takes: TRITON_PTXAS_PATH, or its own where that does not run."""
    for path in (environment.get("TRITON_PTXAS_PATH"), own_ptxas()):
        if path and (number := cuda_version(str(path))):
            return str(path), number
    return None


def other_ptxas(environment: Mapping[str, str] = os.environ) -> tuple[str, str] | None:
    """Path and version of the newest ptxas of another version than the one in use; None if there is none."""
    used = ptxas_in_use(environment)
    others = {p: v for p, v in find_ptxas(environment).items() if used is None or v != used[1]}
    return max(others.items(), key=lambda pair: _as_numbers(pair[1]), default=None)


def find_nvcc(environment: Mapping[str, str] = os.environ) -> str | None:
    home = environment.get("CUDA_HOME")
    places = [environment.get("CUDACXX"), f"{home}/bin/nvcc" if home else None, which("nvcc", environment)]
    return next((p for p in [*places, f"{TOOLKIT}/bin/nvcc"] if p and cuda_version(p)), None)


def find_cuda_tool(name: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """A tool of the CUDA toolkit, in PATH or where the toolkit puts it."""
    folders = [f"{environment.get('CUDA_HOME', TOOLKIT)}/bin", f"{TOOLKIT}/bin"]
    folders += [str(p) for p in sorted(NSIGHT_COMPUTE.glob("*"), reverse=True)]
    return which(name, environment) or shutil.which(name, path=os.pathsep.join(folders))


def which(name: str, environment: Mapping[str, str]) -> str | None:
    return shutil.which(name, path=environment.get("PATH", ""))


def output(command: Sequence[str]) -> str:
    """What a command prints; empty where it fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
