"""Writing results so that an interruption at any point leaves whole files only.

Every file is written under a temporary name in its own folder and renamed when complete. The name holds the machine and
a random part, and its writer holds a lock on it while it writes. The next run removes those of its own machine that
nobody holds, and those of other machines, whose locks it may not see, when they are an hour old.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import socket
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from msformer.text import json_text
from msformer.text import printable as printable

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be renamed
    fcntl = None  # type: ignore[assignment]

SIGNATURE = ("Software", "msformer")
"""Keyword and text in the PNG files that are written."""
OLD = 3600.0
"""Seconds after which a temporary file of another machine is nobody's."""
_TEMPORARY = re.compile(r"\.msformer-(?:.+-)?([0-9a-f]+)-(?:[0-9a-f]{12}|probe)")
"""Also those of older versions, which have a process id in place of the machine."""
_OF_THE_NAME = {
    getattr(errno, name)
    for name in (
        *("ENAMETOOLONG", "EILSEQ", "EINVAL", "EISDIR", "ENOTDIR", "ELOOP", "EEXIST", "ENOTEMPTY", "EFBIG"),
        *("EACCES", "EPERM"),  # one folder of many; whether the whole can be written to is tried before
    )
    if hasattr(errno, name)
}
"""Errors of one file; others, such as a full disk, are those of all."""


class OutputError(OSError):
    """A result cannot be written; the message names the file or folder and the reason."""


class NameRefused(OutputError):
    """A result cannot be written by this name, or is too large for a file; others can be."""


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to; it becomes `path` when the block ends without an error.

    Folders that are missing above it are made.

    Raises:
        NameRefused: the name is too long, not one for this disk, or that of a folder; or the file is too large.
        OutputError: the block or the renaming failed with another OSError (disk full, no permission, ...).
    """
    with writing(path):
        check_name(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(path.parent) as temporary:
            yield temporary
            os.replace(temporary, path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError in the block becomes an OutputError that says that `path` cannot be written."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise _refused(path, error) from error


def check_name(path: Path) -> None:
    """Raises NameRefused for a path that no file can have."""
    try:
        if stat.S_ISDIR(path.lstat().st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except FileNotFoundError:
        pass
    except ValueError as error:  # a null byte, or what the encoding of names does not have
        raise NameRefused(f"cannot write {path}: {error}") from error
    except OSError as error:
        raise _refused(path, error) from error


def _refused(path: Path, error: OSError) -> OutputError:
    kind = NameRefused if error.errno in _OF_THE_NAME else OutputError
    return kind(f"cannot write {path}: {error.strerror or error}")


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """A new file, locked as long as it has this name."""
    while True:
        # short, since a name may be as long as the file system allows
        path = folder / f".msformer-{_host()}-{machine()}-{secrets.token_hex(6)}"
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
        if fcntl is None:
            os.close(handle)
            break
        if locked(handle) is not False and is_open_as(handle, path):
            break
        os.close(handle)  # another run took it for one that nobody holds, just before it was locked
    try:
        yield path
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        if fcntl is not None:
            os.close(handle)


def locked(handle: int) -> bool | None:
    """Locks an open file; False if another process has it locked, None where the file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_open_as(handle: int, path: Path) -> bool:
    """Whether an open file is the one that has this path now."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


@cache
def machine() -> str:
    """Of the running system: the same in all of its containers, another after the next start."""
    try:
        identity = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        identity = f"{socket.gethostname()} {uuid.getnode()}"
    return hashlib.sha256(identity.encode()).hexdigest()[:8]


def _host() -> str:
    return re.sub(r"[^a-zA-Z0-9]", "-", socket.gethostname())[:24] or "host"


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Writes files below a folder, records last, so that what has a record is complete.

    Args:
        files: content by path below the folder; those that end in ``.json`` are records.

    Raises:
        OutputError: a file cannot be written.
    """
    records = [name for name in files if name.endswith(".json")]
    for name in records:
        remove(folder / name)  # an older one is not that of the new files
    for name in [*(name for name in files if name not in records), *records]:
        with complete_file(folder / name) as temporary:
            temporary.write_bytes(files[name])


def remove(path: Path) -> None:
    """Removes a file, if it is there.

    Raises:
        OutputError: it cannot be removed.
    """
    with writing(path), suppress(FileNotFoundError, NotADirectoryError):
        path.unlink()


def prepare_folder(folder: Path) -> None:
    """Makes the folder, sees that it can be written to, and removes what interrupted runs left.

    Raises:
        OutputError: it cannot be made or written to.
    """
    remove_leftovers(folder, make_folder(folder))


def remove_leftovers(folder: Path, now: float) -> None:
    """Removes temporary files that nobody writes any more; `now` by the clock of the folder's disk."""
    for leftover in folder.rglob(".msformer-*"):
        match = _TEMPORARY.fullmatch(leftover.name)
        if match and _is_nobodys(leftover, now, here=match[1] == machine()):
            with suppress(OSError):
                leftover.unlink(missing_ok=True)


def make_folder(folder: Path) -> float:
    """Makes the folder and sees that it can be written to; returns the time by the clock of its disk.

    Raises:
        OutputError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise OutputError(f"cannot make the folder {folder}: {reason or error}") from error
    try:
        with _temporary(folder) as probe:
            probe.write_bytes(b"msformer")
            return probe.stat().st_mtime
    except OSError as error:
        raise OutputError(f"cannot write to the folder {folder}: {error.strerror or error}") from error


def _is_nobodys(leftover: Path, now: float, here: bool) -> bool:
    """Whether whoever wrote a temporary file is gone."""
    try:
        if now - leftover.lstat().st_mtime > OLD:
            return True
        if not here:
            return False
        handle = os.open(leftover, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return False
    try:
        return locked(handle) is True
    finally:
        os.close(handle)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON that a person can read."""
    with complete_file(path) as temporary:
        temporary.write_text(json_text(json.dumps(content, indent=1, ensure_ascii=False)) + "\n", encoding="utf-8")


def read_record(path: Path) -> dict[str, Any] | None:
    """The object that a JSON file holds; None if there is none, or the file is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None  # a pipe would be waited for
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
