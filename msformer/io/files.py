"""Finding image files in folders, and what they are called."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path

from msformer.io.dicom import is_dicom
from msformer.output import printable

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".gif", ".webp", ".avif", ".heic", ".heif", ".hif"),
    *(".tif", ".tiff", ".btf", ".lsm", ".jp2", ".j2k", ".jpx", ".pgm", ".ppm", ".pbm", ".pnm"),
    *(".dcm", ".dicom", ".nii", ".nii.gz"),
)


def find_images(paths: Iterable[str | PathLike[str]], *, exclude: Iterable[Path] = ()) -> list[Path]:
    """The image files among the given files and folders (and their subfolders), sorted within each, without repeats.

    Args:
        exclude: folders to leave out where they lie below a given one, such as that of earlier results.

    Raises:
        FileNotFoundError: a path that does not exist.
        PermissionError: a folder that cannot be read.
        ValueError: no image at all, or a given folder is to be left out.
    """
    found: dict[Path, Path] = {}
    given = [Path(path) for path in paths]
    excluded = {folder.resolve() for folder in exclude}
    for path in given:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        if path.is_dir() and path.resolve() in excluded:
            raise ValueError(f"{path}: results cannot go into the folder that the images are in; expected another")
        left_out = {folder for folder in excluded if path.resolve() in folder.parents}
        for file in _images_below(path) if path.is_dir() else [path]:
            if left_out.isdisjoint(file.resolve().parents):
                found.setdefault(file.parent.resolve() / file.name, file)  # links to one image are several
    if not found:
        listed = ", ".join(map(str, given))
        raise ValueError(f"no images ({', '.join(SUFFIXES)}) in: {listed}")
    return list(found.values())


def _images_below(folder: Path) -> Iterator[Path]:
    try:
        entries = sorted(folder.iterdir())
    except PermissionError as error:
        raise PermissionError(f"{folder}: the folder cannot be read: {error.strerror}") from error
    for entry in entries:
        if entry.name.startswith(".") or entry.name.upper() == "DICOMDIR":
            continue
        if entry.is_dir():
            yield from _images_below(entry)
        elif entry.name.lower().endswith(SUFFIXES) or is_dicom(entry):
            yield entry


def plain_name(path: Path) -> str:
    """The name of an image file without its suffix, of which ``.nii.gz`` is one, and the end of a DICOM UID is none."""
    if path.suffix[1:].isdigit():
        return printable(path.name)
    stem = path.name[: -len(".nii.gz")] if path.name.lower().endswith(".nii.gz") else path.stem
    return printable(stem or path.name)
