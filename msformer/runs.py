"""Segmenting many image files into a folder: names, records, resuming, pictures, summary.

For an image ``sub/name.jpg`` the folder gets ``sub/name.labels.png`` (indexed), ``sub/name.overlay.png`` and
``sub/name.json``, the record of how it was made. A record is written last, so that an image with a record is complete.
An image whose record has the same settings and the same input (by content) is not segmented again.
"""

from __future__ import annotations

import hashlib
import platform
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage

import msformer
from msformer.data import prepare_image, read_image
from msformer.losses import LossWeights
from msformer.output import complete_file, read_json, write_json
from msformer.pictures import ROWS_PER_SHEET, SheetRow, contact_sheet, indexed_png, overlay
from msformer.segmentation import Progress, Segmentation, segment

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
        plain = resolved.relative_to(root).with_suffix("").as_posix()
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


def done_before(job: Job, folder: Path, settings: Record) -> Record | None:
    """The record of this image, if it is complete and was made from the same input with the same settings."""
    record: Record | None = read_json(job.file(folder, ".json"))
    if record is None or record.get("settings") != settings or record.get("source") != str(job.source.resolve()):
        return None
    if not all(job.file(folder, suffix).exists() for suffix in (".labels.png", ".overlay.png")):
        return None
    return record if record.get("sha256") == fingerprint(job.source) else None


def settings_record(options: Record) -> Record:
    """The settings as they go into records: plain JSON, and the version, since another may fit differently."""
    weights: LossWeights = options["weights"]
    plain = {name: value for name, value in options.items() if name != "weights"}
    return plain | {
        "weights": {"ce": weights.ce, "inter": weights.inter, "intra": weights.intra},
        "version": msformer.__version__,
    }


def run_job(job: Job, folder: Path, options: Record, progress: Progress | None) -> Record:
    """Segments one image and writes its files.

    Raises:
        ValueError, OSError, FloatingPointError: as `segment`, for this image.
        OutputError: a result cannot be written.
    """
    pixels = read_image(job.source)
    result = segment(pixels, progress=progress, **options)
    record = {
        "source": str(job.source.resolve()),
        "sha256": fingerprint(job.source),
        "settings": settings_record(options),
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
    _write_results(job, folder, pixels, result)
    write_json(job.file(folder, ".json"), record)
    return record


def display_image(pixels: Any) -> NDArray[np.uint8]:
    """``[H, W, 3]`` uint8 of any image that `segment` takes."""
    return (prepare_image(pixels).permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


def _write_results(job: Job, folder: Path, pixels: NDArray[Any], result: Segmentation) -> None:
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


def write_sheets(
    jobs: Sequence[Job],
    records: Sequence[Record],
    folder: Path,
    caption: Callable[[Job, Record], str],
    mask: Callable[[Job], NDArray[np.bool_] | None] = lambda job: None,
) -> list[Path]:
    """Contact sheets of all finished images: one page, or numbered pages; returns their paths."""
    pages = [list(zip(jobs, records, strict=True))[i : i + ROWS_PER_SHEET] for i in range(0, len(jobs), ROWS_PER_SHEET)]
    names = ["contact-sheet.png"] if len(pages) == 1 else [f"contact-sheet-{i + 1}.png" for i in range(len(pages))]
    for page, name in zip(pages, names, strict=True):
        rows = [
            SheetRow(
                Path(job.name).name,
                caption(job, record),
                display_image(job.source),
                read_labels(job.file(folder, ".labels.png")),
                mask(job),
            )
            for job, record in page
        ]
        with complete_file(folder / name) as temporary:
            contact_sheet(rows, temporary)
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
