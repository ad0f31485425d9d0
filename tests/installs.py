"""Installs what `make wheels` and `python -m build` make in fresh environments, and runs tests/installed.py there.

    python -m tests.installs [--pythons 3.12 3.13]

Every wheel in dist/ for this processor gets an environment of its own with its CPython. The sdist is made from a copy
of the sources without .git, and installed, by commands that find neither a compiler nor git on their PATH. Runs in the
environment of `make wheels`, and takes a minute or two for each.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "csrc"))
from wheels import PYTHONS, find_python  # noqa: E402

TORCH = ("torch==2.13.0+cpu", "torch>=2.8")
"""The CPU build where the index has it, else what it has."""
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.so", "*_error.txt", "__pycache__", ".*_cache")


def environment(path: str | None = None) -> dict[str, str]:
    """Without what this process is told about the package; with another PATH, if one is given."""
    others = {n: v for n, v in os.environ.items() if not n.startswith(("MSFORMER_", "PYTHON")) and n != "CXX"}
    return others if path is None else others | {"PATH": path}


def run(*command: str, cwd: Path, path: str | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=environment(path), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def install_and_run(python: str, package: Path, folder: Path, *arguments: str, path: str | None = None) -> None:
    """In a new environment in the folder."""
    print(f"$ pip install {package.name}", flush=True)
    run(python, "-m", "venv", "environment", cwd=folder)
    interpreter = str(folder / "environment/bin/python")
    pip = [interpreter, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    for torch in TORCH:
        if (
            subprocess.run([*pip, torch], cwd=folder, env=environment(), capture_output=True, check=False).returncode
            == 0
        ):
            break
    started = time.monotonic()
    run(*pip, str(package), cwd=folder, path=path)
    print(f"{time.monotonic() - started:.0f} s, after torch", flush=True)
    print(run(interpreter, str(ROOT / "tests/installed.py"), *arguments, cwd=folder, path=path), flush=True)


def install_wheels(pythons: list[str]) -> None:
    wheels = {wheel.name.split("-")[2]: wheel for wheel in (ROOT / "dist").glob(f"*_{platform.machine()}.whl")}
    for version in pythons:
        wheel, python = wheels.get(f"cp{version.replace('.', '')}"), find_python(version)
        if wheel is None or python is None:
            print(f"CPython {version}: {'its wheel' if wheel is None else 'it'} is not here", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            install_and_run(python, wheel, Path(folder))


def install_sdist() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        nothing = folder / "nothing"
        nothing.mkdir()
        shutil.copytree(ROOT, folder / "sources", ignore=LEFT_OUT)
        run(
            sys.executable, "-m", "build", "--sdist", "--outdir", str(folder), cwd=folder / "sources", path=str(nothing)
        )
        (sdist,) = folder.glob("*.tar.gz")
        install_and_run(sys.executable, sdist, folder, "reference", path=str(nothing))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pythons", nargs="+", metavar="VERSION", default=list(PYTHONS))
    install_wheels(parser.parse_args().pythons)
    print("Without a compiler and without git:")
    install_sdist()


if __name__ == "__main__":
    main()
