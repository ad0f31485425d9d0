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
from msformer.io.ordinary import read_written
from msformer.io.prepare import prepare_image
from msformer.io.read import read_image
from msformer.output import complete_file, write_json
from msformer.pictures import ROWS_PER_SHEET, SheetRow, contact_sheet, indexed_png, overlay
from msformer.runs.plan import SUMMARY, Job, Plan
from msformer.runs.ways import Record, Result

SUMMARISED = (
    *("source", "labels", "steps", "settled", "confidence", "decided_by"),
    *("seconds", "device", "backend", "size"),
)
"""What the summary has of a record."""
_SHEET = re.compile(r"contact-sheet(-\d+)?\.png")


def write_volumes(jobs: Sequence[Job], folder: Path, kinds: Sequence[str]) -> None:
    """Puts the label maps, masks and probabilities of slices of volumes together into a NIfTI file each.

    Args:
        jobs: finished ones; those that are not slices are left alone.
        kinds: as of a `Plan`.

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
        places = [read_slice(job.source, job.slice_index) for job in slices]
        for kind in kinds:
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
    job.file(folder, "").parent.mkdir(parents=True, exist_ok=True)
    for kind, picture in pictures.items():
        with complete_file(job.file(folder, f".{kind}.png")) as temporary:
            picture.save(temporary, format="PNG", optimize=kind == "labels")


def read_labels(path: Path) -> NDArray[Any]:
    """The label map of an indexed PNG."""
    return read_written(path)


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
