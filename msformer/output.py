"""Writing results so that an interruption at any point leaves whole files only.

Every file is written under a temporary name in its own folder and renamed when complete. Temporaries carry the process
id; those of processes that are gone are removed by the next run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_TEMPORARY = re.compile(r"\.msformer-(\d+)-.*")


class OutputError(OSError):
    """A result cannot be written; the message names the file or folder and the reason."""


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to; it becomes `path` when the block ends without an error.

    Raises:
        OutputError: the block or the renaming failed with an OSError (disk full, no permission, ...).
    """
    # short, since a name may be as long as the file system allows
    temporary = path.with_name(f".msformer-{os.getpid()}-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Writes files below a folder, records last, so that what has a record is complete.

    Args:
        files: content by path below the folder; those that end in ``.json`` are records.

    Raises:
        OutputError: a file cannot be written.
    """
    records = [name for name in files if name.endswith(".json")]
    for name in records:
        (folder / name).unlink(missing_ok=True)  # an older one is not that of the new files
    for name in [*(name for name in files if name not in records), *records]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with complete_file(folder / name) as temporary:
            temporary.write_bytes(files[name])


def prepare_folder(folder: Path) -> None:
    """Makes the folder, sees that it can be written to, and removes what interrupted runs left.

    Raises:
        OutputError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error.strerror or error}") from error
    probe = folder / f".msformer-{os.getpid()}-probe"
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OutputError(f"cannot write to the folder {folder}: {error.strerror or error}") from error
    for leftover in folder.rglob(".msformer-*"):
        match = _TEMPORARY.fullmatch(leftover.name)
        if match and not _is_running(int(match[1])):
            leftover.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if process == os.getpid():
        return False  # nothing of this process is being written yet
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def printable(text: str) -> str:
    """With a replacement character for what is no Unicode; names of files need not be."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def write_json(path: Path, content: Any) -> None:
    """Writes JSON that a person can read."""
    with complete_file(path) as temporary:
        text = json.dumps(content, indent=1, ensure_ascii=False)
        temporary.write_text(printable(text) + "\n", encoding="utf-8")


def read_record(path: Path) -> dict[str, Any] | None:
    """The object that a JSON file holds; None if there is none, or the file is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
