"""The pictures of all images of a run: contact sheets, and ``report.html``, one self-contained page to look at.

Both are made in one pass over the images, so that each is read once. The page is written last, when all that it shows
and leads to is there.
"""

from __future__ import annotations

import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from numpy.typing import NDArray

import msformer
from msformer.io.read import read_image
from msformer.output import complete_file, remove
from msformer.page import rendered
from msformer.pictures import (
    ROWS_PER_SHEET,
    SheetRow,
    colour_labels,
    contact_sheet,
    outline,
    overlay,
    picture_url,
    read_labels,
    shaded,
    small_row,
)
from msformer.runs.plan import Job, Plan, settings_line
from msformer.runs.ways import Record
from msformer.runs.write import display_image
from msformer.scoring import Mask

REPORT = "report.html"
LARGEST = 240
"""Pixels of a side of a picture in the report, at least half of that."""
SORTED_BY = ("labels", "steps", "confidence", "seconds", "notes")
_SHEET = re.compile(r"contact-sheet(-\d+)?\.png")


@dataclass(frozen=True)
class Page:
    """What the pictures of all show beside the records."""

    settings: Record
    failures: dict[str, str]
    """The errors by origin."""
    warnings: Sequence[str]
    """Of the whole run."""
    caption: Callable[[Job, Record], str]
    mask: Callable[[Job], Mask | None]
    """Of which the border is drawn."""
    border: str
    """What that is, in words."""
    found: Callable[[Job], Mask | None] = lambda job: None
    """A mask that was made without that one, drawn with its border."""


@dataclass(frozen=True)
class Shown:
    """A picture in the report."""

    what: str
    url: str
    height: int
    width: int
    file: str | None
    """That it leads to, as a relative address."""


@dataclass(frozen=True)
class Article:
    """An image in the report."""

    name: str
    pictures: list[Shown]
    facts: str
    notes: list[str]
    values: dict[str, float]
    """That the images can be sorted by."""


def write_pictures_of_all(
    jobs: Sequence[Job], records: Sequence[Record], folder: Path, plan: Plan, page: Page
) -> tuple[list[Path], dict[str, str]]:
    """Contact sheets of all finished images, one page or numbered pages, and the report.

    Returns:
        The paths of the sheets, and the errors by origin of images that cannot be drawn, as they are gone meanwhile.
    """
    pages = [list(zip(jobs, records, strict=True))[i : i + ROWS_PER_SHEET] for i in range(0, len(jobs), ROWS_PER_SHEET)]
    names = ["contact-sheet.png"] if len(pages) == 1 else [f"contact-sheet-{i + 1}.png" for i in range(len(pages))]
    missing: dict[str, str] = {}
    written: list[Path] = []

    def articles() -> Iterator[Article]:
        for some, name in zip(pages, names, strict=True):
            rows = []
            for job, record in some:
                try:
                    row = _row(job, record, folder, plan, page)
                except (ValueError, OSError, SyntaxError, MemoryError) as error:
                    missing[job.origin] = str(error)
                    continue
                rows.append(row)
                yield _article(job, record, row, plan, page)
            if rows:
                with complete_file(folder / name) as temporary:
                    contact_sheet(rows, temporary, page.border)
                written.append(folder / name)

    parts = rendered(
        "msformer.runs",
        "report.html",
        "report.js",
        about=_about(page, len(jobs)),
        failures=page.failures,
        warnings=page.warnings,
        keys=[key for key in SORTED_BY if key == "notes" or any(key in record for record in records)],
        gallery=articles(),
        width=LARGEST,
    )
    with complete_file(folder / REPORT) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(parts)
    for stale in folder.iterdir():
        if _SHEET.fullmatch(stale.name) and stale not in written:
            remove(stale)
    return written, missing


def _row(job: Job, record: Record, folder: Path, plan: Plan, page: Page) -> SheetRow:
    pixels = display_image(read_image(job.source, plan.reading_of(job)))
    labels, mask = read_labels(job.file(folder, ".labels.png")), page.mask(job)
    return small_row(Path(job.name).name, page.caption(job, record), pixels, labels, mask, page.found(job))


def _article(job: Job, record: Record, row: SheetRow, plan: Plan, page: Page) -> Article:
    small = small_row(row.name, row.caption, row.image, row.labels, row.mask, row.found, largest=LARGEST)
    pictures = [
        _shown("image", small.image),
        _shown("overlay", overlay(small.image, small.labels), f"{job.name}.overlay.png"),
        _shown("labels", colour_labels(small.labels), f"{job.name}.labels.png"),
    ]
    if small.mask is not None:
        file = None if plan.mask is None else f"{job.name}.mask.png"
        what = page.border if small.found is None else f"mask, {page.border}"
        inside = small.mask if small.found is None else small.found
        pictures.append(_shown(what, outline(shaded(small.image, inside), small.mask), file))
    read, size = record.get("read", {}), record["size"]
    notes = list(read.get("notes", []))
    facts = [row.caption, f"{record['seconds']:.1f} s", f"{size[1]} x {size[0]} pixels"]
    facts += [f"rule {record['rule']}"] if "rule" in record else []
    facts += [read["modality"]] if read.get("modality") else []
    facts += [f"shown from {read['window'][0]:g} to {read['window'][1]:g}"] if read.get("window") else []
    values = {key: float(record[key]) for key in SORTED_BY if key in record}
    return Article(job.name, pictures, ", ".join(facts), notes, values | {"notes": len(notes)})


def _shown(what: str, pixels: NDArray[np.uint8], file: str | None = None) -> Shown:
    height, width = pixels.shape[:2]
    return Shown(what, picture_url(pixels), height, width, None if file is None else quote(file))


def _about(page: Page, count: int) -> dict[str, str]:
    failed = f", {len(page.failures)} failed" if page.failures else ""
    return {
        "command": shlex.join(["msformer", *sys.argv[1:]]),
        "images": f"{count} segmented{failed}",
        "settings": settings_line(page.settings),
        "msformer": msformer.__version__,
        "machine": f"{platform.platform()}, torch {torch.__version__}, {torch.get_num_threads()} threads",
    }
