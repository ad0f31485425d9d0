"""Finds compilers, and runs ninja: what the builds of all extensions share (extensions.py says what is built)."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CUDA_ARCHITECTURES = (80, 89, 90, 100, 120)
"""What is compiled for, where nvcc knows it. Code of 80 also runs on 86, of 100 on 103, of 120 on 121; for what is
newer there is PTX of the first."""
DEFAULT_TOOLKIT = "/usr/local/cuda/bin"
"""Where a CUDA toolkit lies that is not on PATH."""
OLDEST_CUDA_ARCHITECTURE = 80
"""The kernels use cp.async and tensor cores for bfloat16 and tf32."""


class NotBuilt(Exception):
    """An extension is not built here, for a reason that is no fault; the first line of the message says it."""


class BuildFailed(NotBuilt):
    """An extension should be built and cannot be; the first line of the message says why."""


def find_compiler() -> list[str]:
    """The command of a C++ compiler; CXX may carry options of its own."""
    if sys.platform == "win32":
        raise NotBuilt("it is not built on Windows: the kernels use vector types of GCC and Clang, which MSVC has not")
    wanted = shlex.split(os.environ.get("CXX", ""))
    for command in [wanted] if wanted else [["g++"], ["c++"], ["clang++"]]:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    names = wanted[0] if wanted else "g++, c++, clang++"
    raise BuildFailed(f"no C++ compiler: {names} not found on PATH (on Debian: apt install g++)")


def find_nvcc() -> str:
    """nvcc: that of CUDACXX, CUDA_HOME, CUDA_PATH, PATH, the usual folder of the toolkit, or the Python package
    nvidia-cuda-nvcc, the first there is.

    The package is looked for without an import, beside the interpreter, too, as an isolated build of pip hides it.
    """
    if wanted := os.environ.get("CUDACXX"):
        if found := shutil.which(wanted):
            return found
        raise BuildFailed(f"CUDACXX names {wanted}, which is no program")
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [str(Path(home, "bin")) for home in homes] + [os.environ.get("PATH", os.defpath), DEFAULT_TOOLKIT]
    sites = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    folders += [str(folder) for site in sites for folder in sorted(Path(site, "nvidia").glob("*/bin"), reverse=True)]
    if found := shutil.which("nvcc", path=os.pathsep.join(folders)):
        return found
    raise NotBuilt(
        f"no nvcc, which compiles the CUDA kernels: it is neither in CUDACXX, CUDA_HOME, CUDA_PATH, PATH nor "
        f"{DEFAULT_TOOLKIT}, nor is the package nvidia-cuda-nvcc installed (pip install nvidia-cuda-nvcc, then "
        "pip install --force-reinstall --no-deps --no-cache-dir msformer)"
    )


def cuda_architectures(nvcc: str) -> tuple[int, ...]:
    """What to compile for: those of MSFORMER_CUDA_ARCHS, such as "80,90", else of `CUDA_ARCHITECTURES`, that this nvcc
    knows."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False)
    known = {int(number) for number in re.findall(r"^sm_(\d+)$", listed.stdout, re.MULTILINE)}
    if not known:
        raise BuildFailed(f"{nvcc} --list-gpu-code names no architecture: {(listed.stdout + listed.stderr).strip()}")
    if wanted := os.environ.get("MSFORMER_CUDA_ARCHS"):
        usable = sorted(number for number in known if number >= OLDEST_CUDA_ARCHITECTURE)
        numbers = [int(word) if word.isdecimal() else -1 for word in re.split(r"[,; ]+", wanted.strip())]
        if not set(numbers) <= set(usable):
            names = ", ".join(map(str, usable))
            raise BuildFailed(f"MSFORMER_CUDA_ARCHS: expected numbers of {names}, with commas between; got {wanted!r}")
        return tuple(sorted(set(numbers)))
    if found := tuple(number for number in CUDA_ARCHITECTURES if number in known):
        return found
    raise BuildFailed(f"{nvcc} knows none of the architectures {', '.join(map(str, CUDA_ARCHITECTURES))}")


def python_includes() -> list[str]:
    """Options for what includes pybind11."""
    try:
        import pybind11
    except ImportError as error:
        raise BuildFailed(f"a build requirement is missing: {error}") from error
    return [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]


@dataclass(frozen=True)
class Object:
    """An object file, named relative to the folder of the build, and the command that compiles its source."""

    name: str
    source: Path
    command: Sequence[str]


def run_ninja(output: Path, folder: Path, objects: Sequence[Object], link: Sequence[str]) -> None:
    """Links the objects to `output`; what has not changed since the last time in `folder` is not compiled again."""
    try:
        import ninja
        from ninja.ninja_syntax import Writer
    except ImportError as error:
        raise BuildFailed(f"a build requirement is missing: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    with (folder / "build.ninja").open("w") as file:
        script = Writer(file)
        command = "$compiler -MD -MF $out.d -c $in -o $out"
        script.rule("compile", command, description="compile $out", depfile="$out.d", deps="gcc")
        script.rule("link", f"{shlex.join(link)} $in -o $out", description="link")
        for each in objects:
            script.build(each.name, "compile", str(each.source), variables={"compiler": shlex.join(each.command)})
        script.build(str(output), "link", [each.name for each in objects])
    program = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder)]
    result = subprocess.run(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(result.stdout)
    if result.returncode != 0:
        lines = result.stdout.splitlines()
        errors = [line for line in lines if re.search(r"\b(error|fatal)\b", line, re.IGNORECASE)]
        reason = (errors or [line for line in lines if "FAILED" in line] or ["no message"])[0]
        raise BuildFailed(f"{link[0]} failed: {reason}\n\n{result.stdout[-8000:]}")
