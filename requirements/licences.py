"""Writes docs/licences.md, the licences of all that the lock files install: python requirements/licences.py PYTHON

PYTHON is the interpreter of an environment with these packages; pip-licenses reads what they say of themselves. Fails
where one says nothing.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
OUTPUT = FOLDER.parent / "docs/licences.md"
GROUPS = {
    "base": "`pip install msformer`, `make demo`",
    "all": "Beside these, for tests, lint, benchmarks and training (`make test`, `make lint`, `make bench`)",
    "docs": "Beside these, for the documentation (`make docs`)",
}
HEAD = """# Licences

msformer is under the MIT licence. This is what it needs, and the licence that each package states. Made by `make
licences` from the lock files.
"""


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names_in(lock: str) -> set[str]:
    text = (FOLDER / f"{lock}.txt").read_text()
    return {normalized(name) for name in re.findall(r"^([\w.-]+)(?:\[[^]]*\])?==", text, re.MULTILINE)}


def stated(python: str) -> dict[str, tuple[str, str, str]]:
    """Name, version and licence, in one line, of what is installed."""
    command = ["pip-licenses", f"--python={python}", "--from=mixed", "--format=json", "--with-system"]
    found = subprocess.run(
        [str(Path(sys.executable).with_name(command[0])), *command[1:]], capture_output=True, text=True, check=True
    )
    rows = [(row["Name"], row["Version"], row["License"].strip().splitlines()[0]) for row in json.loads(found.stdout)]
    return {normalized(name): (name, version, licence) for name, version, licence in rows}


def main(python: str) -> int:
    rows, written, text = stated(python), set[str](), HEAD
    for lock, title in GROUPS.items():
        names = names_in(lock) | (names_in("torch-cpu") if lock == "base" else set())
        text += f"\n## {title}\n\n| package | version | licence |\n|---|---|---|\n"
        for name in sorted(names - written):
            if name not in rows:
                raise SystemExit(f"{name}: is in {lock}.txt, and not installed in {python}")
            text += "| " + " | ".join(rows[name]) + " |\n"
            written.add(name)
    OUTPUT.write_text(text)
    silent = [name for name in sorted(written) if rows[name][2] in ("", "UNKNOWN")]
    print(f"{OUTPUT.name}: {len(written)} packages" + (f"; no licence stated: {', '.join(silent)}" if silent else ""))
    return 1 if silent else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
