"""A Debian for Arm in a folder: an interpreter and the libraries it needs, unpacked and not installed."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

PACKAGES = ["libc6", "libexpat1", "libffi8", "libgcc-s1", "libgomp1", "zlib1g"]


def apt(folder: Path, *command: str) -> str:
    """Runs an apt of its own, which knows of packages for Arm alone and of none that is installed."""
    options = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "Dir::State": folder / "state",
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder / "cache",
    }
    given = [f"-o{name}={value}" for name, value in options.items()]
    packages = folder / "packages"
    done = subprocess.run([command[0], *given, *command[1:]], cwd=packages, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def make_sysroot(folder: Path) -> tuple[Path, str]:
    """The root folder, and the version of its Python, such as 3.11. Raises RuntimeError where apt fails."""
    for name in ("state/lists/partial", "cache/archives/partial", "packages", "root"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "status").touch()
    apt(folder, "apt-get", "update")
    default = re.search(r"Depends: (python3\.\d+)-minimal", apt(folder, "apt-cache", "depends", "python3-minimal"))
    if default is None:
        raise RuntimeError("apt-cache depends python3-minimal names no Python")
    python = default[1]
    own = [f"{python}-minimal", f"lib{python}-minimal", f"lib{python}-stdlib"]
    apt(folder, "apt-get", "download", *own, *PACKAGES)
    for package in sorted((folder / "packages").glob("*.deb")):
        subprocess.run(["dpkg", "-x", str(package), str(folder / "root")], check=True)
    root = folder / "root"
    if not (root / "lib/ld-linux-aarch64.so.1").exists():  # where /lib is a link in a system that is installed
        os.symlink("usr/lib", root / "lib")
    return root, python.removeprefix("python")
