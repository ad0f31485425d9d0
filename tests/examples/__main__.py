"""Runs every example with its defaults, in a folder of its own, and prints how long each took: ``make examples``.

    python -m tests.examples [NAME ...]

What they print goes to the terminal if one of them fails.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.examples.notebook import NOTEBOOK, executed
from tests.examples.runs import command, scripts


def seconds_of_children() -> float:
    """CPU time of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(name: str, folder: Path) -> None:
    """Runs one; its output is printed if it fails."""
    if name == NOTEBOOK.stem:
        executed(folder)
        return
    found = subprocess.run(command(name), cwd=folder, capture_output=True, text=True, check=False)
    if found.returncode:
        raise SystemExit(f"{name} failed:\n{found.stdout}{found.stderr}")


def main() -> None:
    print(f"{'example':<20}{'seconds':>10}{'of CPU':>10}")
    for name in sys.argv[1:] or [*scripts(), NOTEBOOK.stem]:
        with tempfile.TemporaryDirectory() as folder:
            started, used = time.perf_counter(), seconds_of_children()
            run(name, Path(folder))
            print(f"{name:<20}{time.perf_counter() - started:>10.1f}{seconds_of_children() - used:>10.1f}", flush=True)


if __name__ == "__main__":
    main()
