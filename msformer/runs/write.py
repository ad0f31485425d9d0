"""What a run leaves in its folder for each image, and the summary of all."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage

from msformer.io.medical import read_slice
from msformer.io.nifti import write_nifti
from msformer.io.prepare import prepare_image
from msformer.io.read import AS_IT_IS, Reading
from msformer.output import NameRefused, OutputError, remove, write_json
from msformer.pictures import indexed_png, overlay, read_labels, write_png
from msformer.runs.plan import SUMMARY, Job, Plan
from msformer.runs.ways import Record, Result

SUMMARISED = (
    *("source", "labels", "steps", "settled", "confidence", "decided_by"),
    *("seconds", "device", "backend", "size"),
)
"""What the summary has of a record."""


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


def display_image(image: Any, reading: Reading = AS_IT_IS) -> NDArray[np.uint8]:
    """``[H, W, 3]`` uint8 of any image that `segment` takes, a file as the reading says."""
    return (prepare_image(image, reading).permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


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
