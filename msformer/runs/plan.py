"""What a run is going to do: the images and the names of their results, the settings, and how they are recorded."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import msformer
from msformer.io.files import plain_name
from msformer.io.medical import count_slices, is_medical
from msformer.io.read import Reading
from msformer.output import check_name, printable, read_record
from msformer.runs.ways import Record, Way

SUMMARY = "summary"  # summary.json; no image may have this name


@dataclass(frozen=True)
class Job:
    """One image file and the name of its results, a relative path without suffix."""

    source: Path
    name: str
    slice_index: int | None = None
    """Where all slices of a volume are segmented, which this is."""

    def file(self, folder: Path, suffix: str) -> Path:
        return folder / f"{self.name}{suffix}"

    @property
    def origin(self) -> str:
        """The file, and if it is one of several, the slice."""
        return str(self.source) if self.slice_index is None else f"{self.source}, slice {self.slice_index}"

    @property
    def volume(self) -> str:
        """The name of the results of the whole volume."""
        return self.name if self.slice_index is None else self.name.removesuffix(_slice_suffix(self.slice_index))


def _slice_suffix(index: int | None) -> str:
    return "" if index is None else f"-slice-{index:03d}"


def plan_jobs(sources: Iterable[Path], roots: Iterable[Path], folder: Path, all_slices: bool = False) -> list[Job]:
    """Gives each image, or with `all_slices` each slice, a name: its path below the folder it was found in, without
    suffix.

    Where two would have the same name, or the results of another image have it already, the suffix and if need be a
    hash of the image's path are added, so that nothing is overwritten. Names that differ in upper and lower case, or in
    how accents are encoded, are the same, since some disks do not tell them apart.
    """
    taken: set[str] = set()
    jobs = []
    folders = [Path(os.path.abspath(root)) for root in roots if root.is_dir()]
    present = _Present(folder)
    for source in sources:
        resolved = Path(os.path.realpath(source))
        place = Path(os.path.abspath(source))  # where a link lies, not where it leads
        root = next((root for root in folders if root in place.parents), place.parent)
        plain = printable(place.relative_to(root).with_name(plain_name(place)).as_posix())
        digest = hashlib.sha256(os.fsencode(resolved)).hexdigest()[:8]
        candidates = (plain, f"{plain}-{source.suffix[1:].lower()}", f"{plain}-{digest}")
        slices = _slices(source) if all_slices else [None]
        for candidate in candidates:
            # a volume's own name is that of the file which holds all of its slices
            names = list(dict.fromkeys([candidate, *(f"{candidate}{_slice_suffix(index)}" for index in slices)]))
            free = taken.isdisjoint(map(_key, names)) and all(present.is_free(name, resolved) for name in names)
            if free or candidate == candidates[-1]:
                break
        taken.update(map(_key, names))
        jobs += [Job(source, f"{candidate}{_slice_suffix(index)}", index) for index in slices]
    return jobs


def _key(name: str) -> str:
    """What names of files are the same by, on one disk or another."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _slices(source: Path) -> list[int | None]:
    """The slices of a volume; a file with one, or that cannot be read, is taken as it is."""
    try:
        count = count_slices(source)
    except (ValueError, OSError):
        count = 1
    return [None] if count == 1 else list(range(count))


class _Present:
    """The records that a folder of results has."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._listed = cache(self._list)

    def is_free(self, name: str, source: Path) -> bool:
        """Whether a name is nobody's, or this image's."""
        if _key(name) == SUMMARY:
            return False
        path = self._folder / f"{name}.json"
        return all(_is_of(found, source) for found in self._listed(path.parent).get(_key(path.name), ()))

    def _list(self, folder: Path) -> dict[str, list[Path]]:
        """The files of a folder by `_key`."""
        found: dict[str, list[Path]] = {}
        with suppress(OSError):
            for path in folder.iterdir():
                found.setdefault(_key(path.name), []).append(path)
        return found


def _is_of(path: Path, source: Path) -> bool:
    record = read_record(path)
    return record is not None and record.get("source") == printable(str(source))


def fingerprint(source: Path) -> str:
    return hashlib.sha256(source.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """How the images of a run are read and segmented."""

    way: Way
    reading: Reading
    """Of a job without a slice of its own."""
    mask: str | None = None
    """The rule of `msformer.selection` by which a mask is written, or ``"auto"``: as `rule_for` says of each image."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of the pictures that an image gets, and of the volumes: labels, mask, probability."""
        return self.way.kinds if self.mask is None else (*self.way.kinds, "mask")

    def suffixes(self, job: Job) -> list[str]:
        """Of the files that an image gets, but for the record."""
        medical = is_medical(job.source) and job.slice_index is None
        volumes = [f".{kind}.nii.gz" for kind in self.kinds] if medical else []
        return [*(f".{kind}.png" for kind in self.kinds), ".overlay.png", *volumes]

    def check_names(self, job: Job, folder: Path) -> None:
        """Raises NameRefused where a file of an image cannot have its name."""
        for suffix in [*self.suffixes(job), ".json"]:
            check_name(job.file(folder, suffix))

    def reading_of(self, job: Job) -> Reading:
        """How the file of a job is read."""
        return reading_of(job, self.reading)


def reading_of(job: Job, reading: Reading) -> Reading:
    """How the file of a job is read: one of a single slice whatever slice is asked for of volumes."""
    if job.slice_index is not None:
        return replace(reading, slice_index=job.slice_index)
    if reading.slice_index is not None and count_slices(job.source) == 1:
        return replace(reading, slice_index=None)
    return reading


def settings_record(plan: Plan) -> Record:
    """The settings as they go into records: plain JSON, and the version, since another may segment differently."""
    return plan.way.settings() | {
        "window": None if plan.reading.window is None else list(plan.reading.window),
        "slice": plan.reading.slice_index,
        "modality": plan.reading.modality,
        "mask": plan.mask,
        "version": msformer.__version__,
    }


def settings_line(settings: Record) -> str:
    """The settings that are set, in a line for people."""
    given = {name: value for name, value in settings.items() if value is not None and name != "version"}
    given |= given.pop("weights", {})
    return ", ".join(f"{name} {value}" for name, value in given.items())
