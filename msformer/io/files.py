"""Finding image files in folders, and what they are called."""

from __future__ import annotations

import os
import re
import stat
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from msformer.io.dicom import is_dicom
from msformer.output import SIGNATURE, read_record
from msformer.text import printable

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".gif", ".webp", ".avif", ".heic", ".heif", ".hif"),
    *(".tif", ".tiff", ".btf", ".lsm", ".jp2", ".j2k", ".jpx", ".pgm", ".ppm", ".pbm", ".pnm"),
    *(".dcm", ".dicom", ".nii", ".nii.gz"),
)

_RESULT = re.compile(r"(.+)\.(?:labels|overlay|mask|probability)\.(?:png|nii\.gz)|contact-sheet(?:-\d+)?\.png")
_MAPS = "maps"
"""Folder of an evaluation's label maps."""
_KINDS = {
    stat.S_IFIFO: "named pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}
_START = 512
"""Bytes of a PNG file in which its signature is."""
_NAMED = 5
"""Entries of a kind that are named in a warning."""


def find_images(paths: Iterable[str | PathLike[str]], *, exclude: Iterable[Path] = ()) -> list[Path]:
    """The image files among the given files and folders (and their subfolders), sorted within each, without repeats.

    Below folders, links are followed, and each folder is looked into once, whatever leads there. What is no regular
    file, folders that cannot be read, and what earlier runs wrote there are left out, with a warning.

    Args:
        exclude: folders to leave out where they lie below a given one, such as that of earlier results.

    Raises:
        FileNotFoundError: a path that does not exist.
        PermissionError: a given folder that cannot be read.
        ValueError: no image at all, a given path that is neither file nor folder, or a given folder is to be left out.
    """
    found: dict[tuple[int, int, str], Path] = {}
    """By the folder and the name in it: links to one image are several."""
    given = [Path(path) for path in paths]
    excluded = {Path(os.path.realpath(folder)) for folder in exclude}
    for path in given:
        kind, place = _kind_of(path), Path(os.path.realpath(path))
        if kind == stat.S_IFREG:
            found.setdefault((*_identity(path.parent), path.name), path)
        elif kind != stat.S_IFDIR:
            raise ValueError(f"{path}: expected a file or folder, got a {_KINDS.get(kind, 'file of another kind')}")
        elif place in excluded:
            raise ValueError(f"{path}: results cannot go into the folder that the images are in; expected another")
        else:
            walk = _Walk(path, excluded - {place, *place.parents})
            for file in walk.images():
                found.setdefault((*_identity(file.parent), file.name), file)
            walk.warn()
    if not found:
        listed = ", ".join(map(str, given))
        raise ValueError(f"no images ({', '.join(SUFFIXES)}) in: {listed}")
    return list(found.values())


def _identity(folder: Path) -> tuple[int, int]:
    """The same for all paths of a folder."""
    found = folder.stat()
    return found.st_dev, found.st_ino


def _kind_of(path: Path) -> int:
    """Of what a path leads to, as `stat.S_IFMT` says."""
    try:
        return stat.S_IFMT(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise FileNotFoundError(f"{path}: no such file or folder") from error


@dataclass
class _Walk:
    """Through a folder and its subfolders."""

    top: Path
    excluded: set[Path]
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Entries by the reason why they are left out."""
    results: Counter[Path] = field(default_factory=Counter)
    """Files of earlier runs, by folder."""

    def images(self) -> Iterator[Path]:
        """In the order of their paths; without recursion, as folders may be nested as deeply as they like."""
        seen: set[tuple[int, int]] = set()
        stack = [self.top]
        """Files and folders still to be given, the next one last."""
        while stack:
            path = stack.pop()
            mode = self._mode(path)
            if mode is not None and not stat.S_ISDIR(mode):
                if self._is_image(path, mode):
                    yield path
            elif mode is not None and self._is_new(path, seen):
                entries = self._entries(path)
                shown = (name for name in entries if not name.startswith(".") and name.upper() != "DICOMDIR")
                stack += [path / name for name in sorted(shown, reverse=True)]

    def _is_new(self, folder: Path, seen: set[tuple[int, int]]) -> bool:
        """Whether a folder is to be looked into: it was not yet, and is not excluded."""
        here = _identity(folder)
        if here in seen or self._is_excluded(folder):
            return False
        seen.add(here)
        if folder.name == _MAPS and folder != self.top and _is_of_maps(folder):
            self.results[folder] += 1
            return False
        return True

    def _is_excluded(self, path: Path) -> bool:
        """Of a path in a folder that is not: whether it is itself, or leads there."""
        if not self.excluded:
            return False
        place = Path(os.path.realpath(path))
        return not self.excluded.isdisjoint((place, *place.parents))

    def _entries(self, folder: Path) -> list[str]:
        try:
            return [entry.name for entry in folder.iterdir()]
        except OSError as error:
            if folder == self.top:
                raise type(error)(f"{folder}: the folder cannot be read: {error.strerror}") from error
            self._leave_out(folder, f"cannot be read, {error.strerror}")
            return []

    def _mode(self, path: Path) -> int | None:
        """Of what a path leads to; of links that lead nowhere, their own. None if it cannot be found out."""
        try:
            return path.stat().st_mode
        except OSError as error:
            if path.is_symlink():
                return stat.S_IFLNK
            self._leave_out(path, f"cannot be read, {error.strerror}")
            return None

    def _is_image(self, path: Path, mode: int) -> bool:
        if stat.S_ISLNK(mode):
            return path.name.lower().endswith(SUFFIXES)  # reading it says what is wrong
        if not stat.S_ISREG(mode):
            self._leave_out(path, _KINDS.get(stat.S_IFMT(mode), "no regular file"))
            return False
        if not (path.name.lower().endswith(SUFFIXES) or is_dicom(path)):
            return False
        if path.is_symlink() and self._is_excluded(path):
            return False
        if _is_result(path):
            self.results[path.parent] += 1
            return False
        return True

    def _leave_out(self, path: Path, reason: str) -> None:
        self.left_out.setdefault(reason, []).append(path.relative_to(self.top).as_posix())

    def warn(self) -> None:
        """Names what was left out, in a line."""
        parts = [f"results of an earlier run in {folder}" for folder in sorted(self.results)[:_NAMED]]
        for reason, names in self.left_out.items():
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            parts.append(f"{', '.join(names[:_NAMED])}{more} ({reason})")
        if parts:
            warnings.warn(f"{self.top}: left out: {'; '.join(parts)}", stacklevel=3)


def _is_result(path: Path) -> bool:
    """Whether an earlier run wrote a file: by its name, and by the record or the signed label map that come with it."""
    match = _RESULT.fullmatch(path.name)
    if match is None:
        return False
    if match[1] is None:
        return _is_signed(path) or "settings" in (read_record(path.with_name("summary.json")) or {})
    sisters = (path.with_name(name) for name in (f"{match[1]}.json", f"{match[1]}-slice-000.json"))
    return any(_is_record(sister) or _is_signed(sister.with_suffix(".labels.png")) for sister in sisters)


def _is_of_maps(folder: Path) -> bool:
    """Whether the label maps of an evaluation lie below a folder, and the first that is found there is one."""
    with suppress(OSError):
        for path in folder.rglob("*.png"):
            return _is_signed(path) or _is_record(path.with_suffix(".json"))
    return False


def _is_record(path: Path) -> bool:
    """Of a result."""
    return {"settings", "sha256"} <= (read_record(path) or {}).keys()


def _is_signed(path: Path) -> bool:
    """Whether msformer wrote a PNG file. (Earlier versions did not sign.)"""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return "\0".join(SIGNATURE).encode() in file.read(_START)
    except OSError:
        return False


def plain_name(path: Path) -> str:
    """The name of an image file without its suffix, of which ``.nii.gz`` is one, and the end of a DICOM UID is none."""
    if path.suffix[1:].isdigit():
        return printable(path.name)
    stem = path.name[: -len(".nii.gz")] if path.name.lower().endswith(".nii.gz") else path.stem
    return printable(stem or path.name)
