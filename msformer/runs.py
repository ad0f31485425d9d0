"""Segmenting many image files into a folder: names, records, resuming, pictures, summary.

For an image ``sub/name.jpg`` the folder gets ``sub/name.labels.png`` (indexed), ``sub/name.overlay.png``, with a rule
for masks ``sub/name.mask.png`` (0 and 255), and ``sub/name.json``, the record of how it was made. For a DICOM or NIfTI
file label map and mask are written as ``.nii.gz`` too, on the voxels of the input; there label k is k + 1, as 0 is
what was not segmented. Where all slices of a volume are segmented, each is an image of its own, ``name-slice-012``, and
the ``.nii.gz`` of ``name`` holds them all. A record is written last, so that an image with a record is complete. An
image whose record has the same settings and the same input (by content) is not segmented again.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage

import msformer
from msformer.data import (
    Reading,
    is_colour,
    is_ct,
    plain_name,
    prepare_image,
    read_image,
    resize_image,
    resize_labels,
)
from msformer.medical import count_slices, is_medical, read_slice, write_nifti
from msformer.output import complete_file, printable, read_record, write_json
from msformer.pictures import ROWS_PER_SHEET, SheetRow, contact_sheet, indexed_png, overlay
from msformer.presets import LossWeights
from msformer.segmentation import Progress, Segmentation, segment
from msformer.selection import AUTO, rule_for, select

Record = dict[str, Any]

SUMMARY = "summary"  # summary.json; no image may have this name
_SHEET = re.compile(r"contact-sheet(-\d+)?\.png")


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
    hash of the image's path are added, so that nothing is overwritten.
    """
    taken: set[str] = set()
    jobs = []
    folders = [Path(os.path.abspath(root)) for root in roots if root.is_dir()]
    for source in sources:
        resolved = source.resolve()
        place = Path(os.path.abspath(source))  # where a link lies, not where it leads
        root = next((root for root in folders if root in place.parents), place.parent)
        plain = printable(place.relative_to(root).with_name(plain_name(place)).as_posix())
        digest = hashlib.sha256(os.fsencode(resolved)).hexdigest()[:8]
        candidates = (plain, f"{plain}-{source.suffix[1:].lower()}", f"{plain}-{digest}")
        slices = _slices(source) if all_slices else [None]
        for candidate in candidates:
            # a volume's own name is that of the file which holds all of its slices
            names = list(dict.fromkeys([candidate, *(f"{candidate}{_slice_suffix(index)}" for index in slices)]))
            free = taken.isdisjoint(names) and all(_free(folder, name, resolved) for name in names)
            if free or candidate == candidates[-1]:
                break
        taken.update(names)
        jobs += [Job(source, f"{candidate}{_slice_suffix(index)}", index) for index in slices]
    return jobs


def _slices(source: Path) -> list[int | None]:
    """The slices of a volume; a file with one, or that cannot be read, is taken as it is."""
    try:
        count = count_slices(source)
    except (ValueError, OSError):
        count = 1
    return [None] if count == 1 else list(range(count))


def _free(folder: Path, name: str, source: Path) -> bool:
    if name == SUMMARY:
        return False
    path = folder / f"{name}.json"
    record = read_record(path)
    return not path.exists() if record is None else record.get("source") == printable(str(source))


def fingerprint(source: Path) -> str:
    return hashlib.sha256(source.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """How the images of a run are read and segmented."""

    fit: Record
    """Keyword arguments of `segment`."""
    reading: Reading
    """Of a job without a slice of its own."""
    mask: str | None = None
    """The rule of `msformer.selection` by which a mask is written, or ``"auto"``: as `rule_for` says of each image."""

    def suffixes(self, job: Job) -> list[str]:
        """Of the files that an image gets, but for the record."""
        kinds = ["labels"] if self.mask is None else ["labels", "mask"]
        volumes = [f".{kind}.nii.gz" for kind in kinds] if is_medical(job.source) and job.slice_index is None else []
        return [*(f".{kind}.png" for kind in kinds), ".overlay.png", *volumes]

    def reading_of(self, job: Job) -> Reading:
        """A file of one slice is read whatever slice is asked for of volumes."""
        if job.slice_index is not None:
            return replace(self.reading, slice_index=job.slice_index)
        if self.reading.slice_index is not None and count_slices(job.source) == 1:
            return replace(self.reading, slice_index=None)
        return self.reading


class Interrupted(Exception):
    """The run is over, because another image ended it."""


def for_each(jobs: Sequence[Job], work: Callable[[Job, Callable[[], None]], None], at_once: int) -> None:
    """Calls ``work(job, check)`` for all jobs, `at_once` of them in threads at a time.

    What one raises ends the run and is raised here; so is Ctrl-C. The others end where they call `check` next.
    """
    if at_once == 1:
        for job in jobs:
            work(job, lambda: None)
        return
    over = threading.Event()

    def check() -> None:
        if over.is_set():
            raise Interrupted

    with ThreadPoolExecutor(at_once) as pool:
        running = [pool.submit(work, job, check) for job in jobs]
        try:
            for future in as_completed(running):
                future.result()
        except BaseException:
            over.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def done_before(job: Job, folder: Path, plan: Plan) -> Record | None:
    """The record of this image, if it is complete and was made from the same input with the same settings."""
    wanted = {"settings": settings_record(plan), "source": printable(str(job.source.resolve()))}
    record = read_record(job.file(folder, ".json"))
    if record is None or any(record.get(key) != value for key, value in wanted.items()):
        return None
    if not all(job.file(folder, suffix).exists() for suffix in plan.suffixes(job)):
        return None
    return record if record.get("sha256") == fingerprint(job.source) else None


def settings_record(plan: Plan) -> Record:
    """The settings as they go into records: plain JSON, and the version, since another may fit differently."""
    weights: LossWeights = plan.fit["weights"]
    return plan.fit | {
        "weights": asdict(weights),
        "window": None if plan.reading.window is None else list(plan.reading.window),
        "slice": plan.reading.slice_index,
        "mask": plan.mask,
        "version": msformer.__version__,
    }


def run_job(job: Job, folder: Path, plan: Plan, progress: Progress | None) -> Record:
    """Segments one image and writes its files.

    Raises:
        ValueError, OSError, FloatingPointError: as `segment`, for this image.
        OutputError: a result cannot be written.
    """
    pixels = read_image(job.source, plan.reading_of(job))
    result = segment(pixels, progress=progress, **plan.fit)
    record = {
        "source": printable(str(job.source.resolve())),
        "sha256": fingerprint(job.source),
        "settings": settings_record(plan),
        "labels": result.num_labels,
        "steps": result.steps,
        "settled": result.settled,
        "seconds": round(result.seconds, 3),
        "device": result.device,
        "backend": result.backend,
        "size": list(result.labels_full.shape),
        "fitted_size": list(result.labels.shape),
        "label_counts": result.label_counts,
        "losses": result.losses,
    }
    job.file(folder, ".json").unlink(missing_ok=True)  # an older record is not that of the new files
    _write_pictures(job, folder, pixels, result)
    mask = None
    if plan.mask is not None:
        rule = rule_of(job, plan, pixels)
        record["rule"] = rule
        mask = object_mask(pixels, result, rule)
        with complete_file(job.file(folder, ".mask.png")) as temporary:
            PILImage.fromarray(mask.astype(np.uint8) * 255).save(temporary, format="PNG")
    if is_medical(job.source) and job.slice_index is None:
        source = read_slice(job.source, plan.reading_of(job).slice_index)
        write_nifti(job.file(folder, ".labels.nii.gz"), [(_from_one(result.labels_full), source)])
        if mask is not None:
            write_nifti(job.file(folder, ".mask.nii.gz"), [(mask, source)])
    write_json(job.file(folder, ".json"), record)
    return record


def rule_of(job: Job, plan: Plan, pixels: NDArray[Any]) -> str:
    """The rule by which the mask of an image is made."""
    if plan.mask not in (None, AUTO):
        return str(plan.mask)
    return rule_for(is_colour(prepare_image(pixels)), is_ct(job.source, plan.reading_of(job).slice_index))


def write_volumes(jobs: Sequence[Job], folder: Path, mask: bool) -> None:
    """Puts the label maps, and masks, of slices of volumes together into a NIfTI file each.

    Args:
        jobs: finished ones; those that are not slices are left alone.

    Raises:
        ValueError, OSError: a volume, or what was made of it, cannot be read any more.
        OutputError: a result cannot be written.
    """
    volumes: dict[str, list[Job]] = {}
    for job in jobs:
        if job.slice_index is not None:
            volumes.setdefault(job.volume, []).append(job)
    for name, slices in volumes.items():
        (folder / f"{name}.json").unlink(missing_ok=True)  # of a single slice, whose files these replace
        found = [(job, read_slice(job.source, job.slice_index)) for job in slices]
        labels = [(_from_one(read_labels(job.file(folder, ".labels.png"))), slice) for job, slice in found]
        write_nifti(folder / f"{name}.labels.nii.gz", labels)
        if mask:
            write_nifti(folder / f"{name}.mask.nii.gz", [(read_mask(job, folder), slice) for job, slice in found])


def _from_one(labels: NDArray[Any]) -> NDArray[np.uint32]:
    """Labels as they go into volumes, where 0 is what was not segmented."""
    return labels.astype(np.uint32) + 1


def display_image(pixels: Any) -> NDArray[np.uint8]:
    """``[H, W, 3]`` uint8 of any image that `segment` takes."""
    return (prepare_image(pixels).permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


def object_mask(pixels: NDArray[Any], result: Segmentation, rule: str) -> NDArray[np.bool_]:
    """The object ``[H, W]`` that a rule of `msformer.selection` finds in a label map, at the size of the image."""
    height, width = result.labels.shape
    found = select(rule, result.labels, resize_image(prepare_image(pixels), (height, width)))
    return resize_labels(found, result.labels_full.shape)


def _write_pictures(job: Job, folder: Path, pixels: NDArray[Any], result: Segmentation) -> None:
    labels = job.file(folder, ".labels.png")
    with complete_file(labels) as temporary:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        indexed_png(result.labels_full).save(temporary, format="PNG", optimize=True)
    with complete_file(job.file(folder, ".overlay.png")) as temporary:
        PILImage.fromarray(overlay(display_image(pixels), result.labels_full)).save(temporary, format="PNG")


def read_labels(path: Path) -> NDArray[Any]:
    """The label map of an indexed PNG."""
    with PILImage.open(path) as image:
        return np.asarray(image)


def read_mask(job: Job, folder: Path) -> NDArray[np.bool_]:
    """The mask that was written for an image."""
    return np.asarray(read_labels(job.file(folder, ".mask.png")) > 0)


def write_sheets(
    jobs: Sequence[Job],
    records: Sequence[Record],
    folder: Path,
    plan: Plan,
    caption: Callable[[Job, Record], str],
    mask: Callable[[Job], NDArray[np.bool_] | None],
    border: str,
) -> list[Path]:
    """Contact sheets of all finished images: one page, or numbered pages; returns their paths."""
    pages = [list(zip(jobs, records, strict=True))[i : i + ROWS_PER_SHEET] for i in range(0, len(jobs), ROWS_PER_SHEET)]
    names = ["contact-sheet.png"] if len(pages) == 1 else [f"contact-sheet-{i + 1}.png" for i in range(len(pages))]
    for page, name in zip(pages, names, strict=True):
        rows = [
            SheetRow(
                Path(job.name).name,
                caption(job, record),
                display_image(read_image(job.source, plan.reading_of(job))),
                read_labels(job.file(folder, ".labels.png")),
                mask(job),
            )
            for job, record in page
        ]
        with complete_file(folder / name) as temporary:
            contact_sheet(rows, temporary, border)
    for stale in folder.iterdir():
        if _SHEET.fullmatch(stale.name) and stale.name not in names:
            stale.unlink()
    return [folder / name for name in names]


def write_summary(
    jobs: Sequence[Job],
    records: Sequence[Record],
    failures: dict[str, str],
    folder: Path,
    settings: Record,
    **more: Any,
) -> None:
    """`summary.json`: the settings, the machine, and a line for each image."""
    images = [
        {"name": job.name, "status": "done"}
        | {k: r[k] for k in ("source", "labels", "steps", "settled", "seconds", "device", "backend", "size")}
        | {"loss": r["losses"][-1]}
        for job, r in zip(jobs, records, strict=True)
    ]
    images += [{"source": source, "status": "failed", "error": error} for source, error in failures.items()]
    machine = {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    write_json(folder / f"{SUMMARY}.json", {"settings": settings, "machine": machine, "images": images} | more)
