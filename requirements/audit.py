"""Looks for known weaknesses of the locked versions: python requirements/audit.py

By pip-audit, which asks the database of the Python Packaging Authority, so with a network alone. Without one it says
that nothing was checked, and ends with status 2; a weakness gives status 1.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def main() -> int:
    command = [str(Path(sys.executable).with_name("pip-audit")), "--disable-pip", "--require-hashes", "--timeout", "10"]
    status = 0
    for lock in ("torch-cpu", "all", "tools"):
        done = subprocess.run(
            [*command, "-r", str(FOLDER / f"{lock}.txt")], capture_output=True, text=True, check=False
        )
        print(f"{lock}.txt: {done.stdout}{done.stderr}".rstrip(), flush=True)
        if done.returncode == 0:
            continue
        if "vulnerabilit" not in done.stderr:
            print("NOTHING WAS CHECKED: the database of weaknesses was not reached. Run `make audit` with a network.")
            return 2
        status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
