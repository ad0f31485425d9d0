"""The kernels of the wheel for Arm against the reference, on a machine of another kind.

    python -m tests.kernels.native.arm dist/msformer-*-aarch64.whl

qemu-user runs the extension of the wheel in a Debian for Arm, which apt fetches into build/arm; PyTorch and the
reference run here (host.py). Every operator is held to the error rule of its tests in float32, bfloat16 and float16,
and compared with the reference in float64, in its small cases and some large ones, on two threads.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
import zipfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import torch

from msformer_kernels.core.operator import OPERATORS
from tests.kernels.native.arm.host import Guest, calls_made_by
from tests.kernels.native.arm.sysroot import make_sysroot
from tests.kernels.ops.shared import DTYPES, check_error_rule, check_float64

FOLDER = Path(__file__).resolve().parents[4] / "build/arm"
EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")
LARGE = 2
"""So many large cases of an operator; the emulation is slow."""


def extension_for(wheels: list[Path], version: str) -> Path:
    """The extension of the wheel for this Python, unpacked."""
    tag = f"cp{version.replace('.', '')}"
    for wheel in wheels:
        if f"-{tag}-" in wheel.name and wheel.stem.endswith("aarch64"):
            with zipfile.ZipFile(wheel) as archive:
                (name,) = (name for name in archive.namelist() if "/_native." in name and name.endswith(".so"))
                return Path(archive.extract(name, FOLDER))
    raise SystemExit(f"no wheel for CPython {version} on aarch64 among {', '.join(w.name for w in wheels) or 'none'}")


def faults(operator: str) -> Iterator[str]:
    """What is wrong with it; nothing, it is to be hoped."""
    cases = import_module(f"tests.kernels.cases.{operator}").CASES
    for case in (*cases.small, *cases.large[:LARGE]):
        for dtype in (*DTYPES, "f64"):
            try:
                if dtype == "f64":
                    check_float64(case, "native")
                else:
                    check_error_rule(case, dtype, "native", most=2)
            except AssertionError as error:
                yield f"{operator} {case} {dtype}: {error}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheels", nargs="*", type=Path)
    options = parser.parse_args()
    emulator = next(filter(None, map(shutil.which, EMULATORS)), None)
    if emulator is None or shutil.which("apt-get") is None:
        missing = (
            "apt-get, which fetches a Debian for Arm," if emulator else "qemu-user (on Debian: apt install qemu-user)"
        )
        print(f"Skipped: {missing} is not here, so the wheel for Arm cannot be run.")
        return 0
    root, version = make_sysroot(FOLDER)
    interpreter = [emulator, "-L", str(root), str(root / f"usr/bin/python{version}"), "-I"]
    guest = Guest(interpreter, extension_for(options.wheels, version))
    print(f"{guest.about}, emulated by {emulator}", flush=True)
    torch.set_num_threads(2)
    wrong = 0
    with calls_made_by(guest):
        for operator in OPERATORS:
            started, calls, found = time.monotonic(), guest.calls, list(faults(operator))
            wrong += len(found)
            print(*found, sep="\n", end="\n" if found else "")
            counts = f"{guest.calls - calls} calls in {time.monotonic() - started:.0f} s"
            print(f"{operator}: {counts}, {len(found) or 'no'} faults", flush=True)
    guest.close()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
