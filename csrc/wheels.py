"""Builds the wheels for Linux: one for each processor and CPython, for any Linux with glibc 2.17 (manylinux_2_17).

    python csrc/wheels.py [--out dist] [--targets x86_64 aarch64] [--pythons 3.10 3.11 3.12 3.13 3.14]

Runs in an environment of requirements/wheels.txt, whose compiler is zig's clang: it holds the symbols of every glibc
and compiles for other processors. The interpreters give their headers alone, and need no packages; one that is not here
is left out, and is named. The kernels do not know of Python and are compiled once for each processor.

Two builds of one commit give the same bytes: times are that of the commit, and files have the same permissions.
"""

from __future__ import annotations

import argparse
import glob
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = ROOT / "build/wheels"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
TARGETS = ("x86_64", "aarch64")
GLIBC = "2.17"
EARLIEST = 315532800
"""1980, before which no file in a zip archive can be."""
ASK = "import sys, sysconfig; print(sys.version_info[:2], sysconfig.get_config_var('Py_GIL_DISABLED') or 0)"


def find_python(version: str) -> str | None:
    """An interpreter of this version, with a GIL: on PATH, or of pyenv."""
    pyenv = os.environ.get("PYENV_ROOT", str(Path.home() / ".pyenv"))
    candidates = [f"python{version}", *sorted(glob.glob(f"{pyenv}/versions/{version}.*/bin/python"), reverse=True)]
    expected = f"{tuple(map(int, version.split('.')))} 0"
    for candidate in filter(None, map(shutil.which, candidates)):
        asked = subprocess.run([candidate, "-c", ASK], capture_output=True, text=True, check=False)
        if asked.stdout.strip() == expected:
            return candidate
    return None


def time_of_commit() -> str:
    """Of SOURCE_DATE_EPOCH, else of the last commit; without git that of the oldest archive."""
    if wanted := os.environ.get("SOURCE_DATE_EPOCH"):
        return wanted
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False) if shutil.which("git") else None
    return asked.stdout.strip() if asked and asked.returncode == 0 else str(EARLIEST)


def environment(target: str, version: str) -> dict[str, str]:
    """What makes setup.py build for the target. The optimisation is for what zig links, and -s leaves symbols out."""
    compiler = [sys.executable, "-m", "ziglang", "c++", "-target", f"{target}-linux-gnu.{GLIBC}", "-O3", "-s"]
    others = {name: value for name, value in os.environ.items() if not name.startswith("MSFORMER_")}
    return others | {
        "CXX": shlex.join(compiler),
        "MSFORMER_CUDA": "0",
        "MSFORMER_REQUIRE_NATIVE": "1",
        "PYTHONPATH": sysconfig.get_path("purelib"),  # setuptools, pybind11 and ninja serve every Python
        "SETUPTOOLS_EXT_SUFFIX": f".cpython-{version.replace('.', '')}-{target}-linux-gnu.so",
        "SOURCE_DATE_EPOCH": time_of_commit(),
        "_PYTHON_HOST_PLATFORM": f"linux-{target}",
    }


def build(python: str, target: str, version: str, out: Path) -> Path:
    """The wheel, in a folder. Nothing but object files is kept in the source folder."""
    with tempfile.TemporaryDirectory() as temporary:
        command = [python, "setup.py", "--quiet", "egg_info", "--egg-base", temporary, "build"]
        command += ["--build-base", f"{temporary}/build", "--build-temp", str(OBJECTS / target)]
        command += ["bdist_wheel", "--dist-dir", temporary, "--plat-name", f"manylinux_2_17_{target}"]
        done = subprocess.run(
            command, cwd=ROOT, env=environment(target, version), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{done.stdout}\n{done.stderr}\nThe wheel for CPython {version} on {target} is not built.")
        (wheel,) = Path(temporary).glob("*.whl")
        return normalized(wheel, out)


def normalized(wheel: Path, folder: Path) -> Path:
    """A copy of the wheel whose files have the same permissions whatever the umask and the checkout are."""
    folder.mkdir(parents=True, exist_ok=True)
    path, unfinished = folder / wheel.name, folder / f".{wheel.name}.unfinished"
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as copy:
        for member in source.infolist():
            entry = zipfile.ZipInfo(member.filename, member.date_time)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (0o100755 if member.filename.endswith(".so") else 0o100644) << 16
            copy.writestr(entry, source.read(member))
    return unfinished.replace(path)


def check(wheel: Path) -> None:
    """auditwheel looks at the symbols and libraries of what is in it, and finds what its name promises."""
    command = [sys.executable, "-m", "auditwheel", "show", str(wheel)]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    if f'"manylinux_2_17_{wheel.stem.rpartition("manylinux_2_17_")[2]}"' not in " ".join(shown.stdout.split()):
        raise SystemExit(f"{wheel.name}: not what its name promises\n{shown.stdout}\n{shown.stderr}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--pythons", nargs="+", metavar="VERSION", default=PYTHONS)
    options = parser.parse_args()
    found = {version: find_python(version) for version in options.pythons}
    for version in (version for version, python in found.items() if python is None):
        print(f"There is no CPython {version} here, and no wheel for it.", flush=True)
    if not any(found.values()):
        parser.error(f"--pythons: none of {', '.join(options.pythons)} is here")
    for target in options.targets:
        for version, python in found.items():
            if python:
                wheel = build(python, target, version, options.out)
                check(wheel)
                print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
