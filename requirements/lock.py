"""Writes the lock files beside it: the versions that pyproject.toml leads to, each with the hashes of its files.

    python requirements/lock.py

Needs uv. They are for Python 3.11 on Linux and the CPU build of torch, which torch-cpu.txt names by its local version:
another index has it only if it has the very same file. base.txt is what `make demo` installs, bench.txt what `make
bench` does, docs.txt what `make docs` does, all.txt is for tests and lint, tools.txt for `make lock`, `make licences`
and `make audit`, wheels.txt for `make wheels`, with any Python that there are wheels for.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import tomllib

FOLDER = Path(__file__).resolve().parent
PROJECT = FOLDER.parent / "pyproject.toml"
TORCH = "2.13.0+cpu"
EXTRAS = {"base": ("segment",), "bench": ("bench",), "docs": ("docs",), "all": ("test", "dev", "bench")}
TOOLS = ("uv", "pip-audit", "pip-licenses")
WHEELS = ("auditwheel", "build", "ziglang==0.17.1")
"""A wheel is as its compiler is, so another version of that is somebody's decision."""
PLATFORM = ["--python-platform", "x86_64-manylinux_2_28"]
QUIET = ["--quiet", "--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links"]


def compile_lock(name: str, source: str, *options: str, python: str = "3.11") -> None:
    """`source` is what a requirements file would have; `python` is the oldest that the versions are for."""
    output = FOLDER / f"{name}.txt"
    found = ["--find-links", os.environ["PIP_FIND_LINKS"]] if os.environ.get("PIP_FIND_LINKS") else []
    command = ["uv", "pip", "compile", "-", "--generate-hashes", "--upgrade", *PLATFORM, *QUIET, *found, *options]
    command += ["--python-version", python]
    done = subprocess.run(command, input=source, cwd=FOLDER.parent, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{output.name}: {done.stderr}")
    output.write_text(f"# Made by `make lock`.\n{done.stdout}")
    print(f"{output.name}: {done.stdout.count('==')} packages")


def main() -> None:
    project = tomllib.loads(PROJECT.read_text())
    build = project["build-system"]["requires"]
    torch = f"torch=={TORCH}"
    compile_lock("torch-cpu", torch)
    for name, extras in EXTRAS.items():
        own = f".[{','.join(extras)}]"
        # torch is installed before, in the build that fits the machine
        apart = [option for package in ("torch", "msformer") for option in ("--no-emit-package", package)]
        compile_lock(name, "\n".join([own, torch, *build]), *apart)
    compile_lock("tools", "\n".join(TOOLS))
    compile_lock("wheels", "\n".join([*WHEELS, *build]), python="3.10")


if __name__ == "__main__":
    sys.exit(main())
