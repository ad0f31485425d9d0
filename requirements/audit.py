"""Looks for known weaknesses of the locked versions: python requirements/audit.py

By pip-audit, which asks the package index for what the Python Packaging Authority's database knows. That needs a
network, and an index that answers such questions; where there is none it says so, and ends with status 2. A weakness
gives status 1.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
OPTIONS = ["--disable-pip", "--no-deps", "--timeout", "10", "--progress-spinner", "off", "--format", "json"]


def audited(lock: str) -> tuple[list[str], list[str], list[str]]:
    """Of the packages of a lock file those without known weaknesses, the weaknesses, and those nothing is known of."""
    locked = (FOLDER / f"{lock}.txt").read_text()
    # a local version, as of the CPU build of torch, is in no database
    plain = re.findall(r"^([\w.-]+(?:\[[^]]*\])?==[^\s+]+)", locked, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text("\n".join(plain))
        command = [str(Path(sys.executable).with_name("pip-audit")), *OPTIONS, "-r", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (json.JSONDecodeError, KeyError):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return [], [], [f"{lock}.txt: {last}"]
    unknown = [f"{each['name']}: {each['skip_reason']}" for each in packages if "skip_reason" in each]
    known = [each for each in packages if "skip_reason" not in each]
    weak = [f"{each['name']} {each['version']}: {v['id']}" for each in known for v in each["vulns"]]
    return [each["name"] for each in known if not each["vulns"]], weak, unknown


def main() -> int:
    found: tuple[list[str], list[str], list[str]] = ([], [], [])
    for lock in ("torch-cpu", "all", "tools"):
        for own, more in zip(found, audited(lock), strict=True):
            own.extend(more)
    good, weak, unknown = found
    print(f"{len(good)} packages without known weaknesses", *weak, sep="\n")
    if unknown:
        print(f"NOT CHECKED: {len(unknown)}, the first is {unknown[0]}")
    if not good and not weak:
        print("NOTHING WAS CHECKED: no database of weaknesses was reached")
    return 1 if weak else 2 if unknown else 0


if __name__ == "__main__":
    sys.exit(main())
