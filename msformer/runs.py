"""Segmenting many image files into a folder: names, records, resuming, pictures, summary.

For an image ``sub/name.jpg`` the folder gets ``sub/name.labels.png`` (indexed), ``sub/name.overlay.png``, with a rule
for masks ``sub/name.mask.png`` (0 and 255), and ``sub/name.json``, the record of how it was made. For a DICOM or NIfTI
file label map and mask are written as ``.nii.gz`` too, on the voxels of the input; there label k is k + 1, as 0 is
what was not segmented. A record is written last, so that an image with a record is complete. An image whose record has
the same settings and the same input (by content) is not segmented again.
"""

from __future__ import annotations

import hashlib
import platform
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage

import msformer
from msformer.data import Reading, plain_name, prepare_image, read_image, resize_image, resize_labels
from msformer.losses import LossWeights
from msformer.medical import is_medical, read_slice, write_nifti
from msformer.output import complete_file, read_json, write_json
from msformer.pictures import ROWS_PER_SHEET, SheetRow, contact_sheet, indexed_png, overlay
from msformer.segmentation import Progress, Segmentation, segment
from msformer.selection import select

Record = dict[str, Any]

SUMMARY = "summary"  # summary.json; no image may have this name
_SHEET = re.compile(r"contact-sheet(-\d+)?\.png")


@dataclass(frozen=True)
class Job:
    """One image file and the name of its results, a relative path without suffix."""

    source: Path
    name: str

    def file(self, folder: Path, suffix: str) -> Path:
        return folder / f"{self.name}{suffix}"


def plan_jobs(sources: Iterable[Path], roots: Iterable[Path], folder: Path) -> list[Job]:
    """Gives each image a name of its own: its path below the folder it was found in, without suffix.

    Where two would have the same name, or the results of another image have it already, the suffix and if need be a
    hash of the image's path are added, so that nothing is overwritten.
    """
    taken: set[str] = set()
    jobs = []
    folders = [root.resolve() for root in roots if root.is_dir()]
    for source in sources:
        resolved = source.resolve()
        root = next((root for root in folders if root in resolved.parents), resolved.parent)
        plain = resolved.relative_to(root).with_name(plain_name(resolved)).as_posix()
        digest = hashlib.sha256(str(resolved).encode()).hexdigest()[:8]
        candidates = (plain, f"{plain}-{source.suffix[1:].lower()}", f"{plain}-{digest}")
        name = next(c for c in candidates if c == candidates[-1] or (c not in taken and _free(folder, c, resolved)))
        taken.add(name)
        jobs.append(Job(source, name))
    return jobs


def _free(folder: Path, name: str, source: Path) -> bool:
    if name == SUMMARY:
        return False
    record = read_json(folder / f"{name}.json")
    return record is None or record.get("source") == str(source)


def fingerprint(source: Path) -> str:
    return hashlib.sha256(source.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """How the images of a run are read and segmented."""

    fit: Record
    """Keyword arguments of `segment`."""
    reading: Reading
    mask: str | None = None
    """The rule of `msformer.selection` by which a mask is written."""

    def suffixes(self, job: Job) -> list[str]:
        """Of the files that an image gets, but for the record."""
        kinds = ["labels"] if self.mask is None else ["labels", "mask"]
        volumes = [f".{kind}.nii.gz" for kind in kinds] if is_medical(job.source) else []
        return [*(f".{kind}.png" for kind in kinds), ".overlay.png", *volumes]


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
    settings = settings_record(plan)
    record: Record | None = read_json(job.file(folder, ".json"))
    if record is None or record.get("settings") != settings or record.get("source") != str(job.source.resolve()):
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
    pixels = read_image(job.source, plan.reading)
    result = segment(pixels, progress=progress, **plan.fit)
    record = {
        "source": str(job.source.resolve()),
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
    _write_pictures(job, folder, pixels, result)
    mask = None if plan.mask is None else object_mask(pixels, result, plan.mask)
    if mask is not None:
        with complete_file(job.file(folder, ".mask.png")) as temporary:
            PILImage.fromarray(mask.astype(np.uint8) * 255).save(temporary, format="PNG")
    if is_medical(job.source):
        source = read_slice(job.source, plan.reading.slice_index)
        write_nifti(job.file(folder, ".labels.nii.gz"), result.labels_full.astype(np.int64) + 1, source)
        if mask is not None:
            write_nifti(job.file(folder, ".mask.nii.gz"), mask, source)
    write_json(job.file(folder, ".json"), record)
    return record


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
    reading: Reading,
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
                display_image(read_image(job.source, reading)),
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
