"""What a run leaves in its folder: pictures, masks, volumes, contact sheets and the summary."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage

from msformer.io.medical import read_slice
from msformer.io.nifti import write_nifti
from msformer.io.prepare import prepare_image
from msformer.io.read import read_image
from msformer.output import NameRefused, OutputError, complete_file, remove, write_json
from msformer.pictures import ROWS_PER_SHEET, contact_sheet, indexed_png, overlay, read_labels, small_row, write_png
from msformer.runs.plan import SUMMARY, Job, Plan
from msformer.runs.ways import Record, Result

SUMMARISED = (
    *("source", "labels", "steps", "settled", "confidence", "decided_by"),
    *("seconds", "device", "backend", "size"),
)
"""What the summary has of a record."""
_SHEET = re.compile(r"contact-sheet(-\d+)?\.png")


def write_volumes(jobs: Sequence[Job], folder: Path, plan: Plan) -> dict[str, str]:
    """Puts the label maps, masks and probabilities of slices of volumes together into a NIfTI file each.

    Args:
        jobs: finished ones; those that are not slices are left alone.

    Returns:
        Errors by file, of volumes that cannot be read any more, or whose results cannot have their name.

    Raises:
        OutputError: nothing can be written.
    """
    volumes: dict[str, list[Job]] = {}
    failures: dict[str, str] = {}
    for job in jobs:
        if job.slice_index is not None:
            volumes.setdefault(job.volume, []).append(job)
    for name, slices in volumes.items():
        try:
            _write_volume(name, slices, folder, plan)
        except (ValueError, OSError, SyntaxError, MemoryError) as error:
            if isinstance(error, OutputError) and not isinstance(error, NameRefused):
                raise
            failures[str(slices[0].source)] = str(error)
    return failures


def _write_volume(name: str, slices: Sequence[Job], folder: Path, plan: Plan) -> None:
    remove(folder / f"{name}.json")  # of a single slice, whose files these replace
    places = [read_slice(job.source, job.slice_index, plan.reading.modality) for job in slices]
    for kind in plan.kinds:
        values = [read_values(job, folder, kind) for job in slices]
        write_nifti(folder / f"{name}.{kind}.nii.gz", list(zip(values, places, strict=True)))


def read_values(job: Job, folder: Path, kind: str) -> NDArray[Any]:
    """Of a picture that was written for an image, what goes into a volume.

    Labels count from 1 there, as 0 is what was not segmented; a mask is one of booleans; probabilities are floats, in
    the 256 steps of their picture.
    """
    pixels = read_labels(job.file(folder, f".{kind}.png"))
    if kind == "labels":
        return pixels.astype(np.uint32) + 1
    return pixels > 0 if kind == "mask" else pixels.astype(np.float32) / 255


def display_image(pixels: Any) -> NDArray[np.uint8]:
    """``[H, W, 3]`` uint8 of any image that `segment` takes."""
    return (prepare_image(pixels).permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


def write_pictures(job: Job, folder: Path, pixels: NDArray[Any], result: Result) -> None:
    """Label map and overlay, and mask and probabilities where there are any."""
    pictures = {"labels": indexed_png(result.labels)}
    pictures["overlay"] = PILImage.fromarray(overlay(display_image(pixels), result.labels))
    if result.mask is not None:
        pictures["mask"] = PILImage.fromarray(result.mask.astype(np.uint8) * 255)
    if result.probability is not None:
        pictures["probability"] = PILImage.fromarray((result.probability * 255).round().astype(np.uint8))
    for kind, picture in pictures.items():
        write_png(picture, job.file(folder, f".{kind}.png"), optimize=kind == "labels")


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
    found: Callable[[Job], NDArray[np.bool_] | None] = lambda job: None,
) -> tuple[list[Path], dict[str, str]]:
    """Contact sheets of all finished images: one page, or numbered pages.

    Args:
        mask: of an image, whose border is drawn; `border` is what it is.
        found: a mask that was made without that one, drawn in place of the overlay.

    Returns:
        The paths of the pages, and the errors by origin of images that cannot be drawn, as they are gone meanwhile.
    """
    pages = [list(zip(jobs, records, strict=True))[i : i + ROWS_PER_SHEET] for i in range(0, len(jobs), ROWS_PER_SHEET)]
    names = ["contact-sheet.png"] if len(pages) == 1 else [f"contact-sheet-{i + 1}.png" for i in range(len(pages))]
    missing: dict[str, str] = {}
    written = []
    for page, name in zip(pages, names, strict=True):
        rows = []
        for job, record in page:
            try:
                pixels = display_image(read_image(job.source, plan.reading_of(job)))
                labels, drawn_mask = read_labels(job.file(folder, ".labels.png")), mask(job)
                found_mask = found(job)
            except (ValueError, OSError, SyntaxError, MemoryError) as error:
                missing[job.origin] = str(error)
                continue
            rows.append(small_row(Path(job.name).name, caption(job, record), pixels, labels, drawn_mask, found_mask))
        if rows:
            with complete_file(folder / name) as temporary:
                contact_sheet(rows, temporary, border)
            written.append(folder / name)
    for stale in folder.iterdir():
        if _SHEET.fullmatch(stale.name) and stale not in written:
            remove(stale)
    return written, missing


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
        | {k: r[k] for k in SUMMARISED if k in r}
        | ({"loss": r["losses"][-1]} if "losses" in r else {})
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
