"""Segmenting an image of a run, and resuming.

A record is written last, so that an image with a record is complete. An image whose record has the same settings and
the same input (by content) is not segmented again.
"""

from __future__ import annotations

import os
from pathlib import Path

from msformer.io.nifti import write_nifti
from msformer.io.prepare import prepare_image
from msformer.io.read import Picture, is_colour, read_picture
from msformer.output import printable, read_record, remove, write_json
from msformer.runs.executors import Report
from msformer.runs.plan import Job, Plan, Record, fingerprint, settings_record
from msformer.runs.write import read_values, write_pictures
from msformer.selection import AUTO, rule_for


def done_before(job: Job, folder: Path, plan: Plan) -> Record | None:
    """The record of this image, if it is complete and was made from the same input with the same settings."""
    wanted = {"settings": settings_record(plan), "source": printable(os.path.realpath(job.source))}
    record = read_record(job.file(folder, ".json"))
    if record is None or any(record.get(key) != value for key, value in wanted.items()):
        return None
    if not all(job.file(folder, suffix).exists() for suffix in plan.suffixes(job)):
        return None
    return record if record.get("sha256") == fingerprint(job.source) else None


def run_job(job: Job, folder: Path, report: Report, *, plan: Plan) -> Record:
    """Segments one image and writes its files.

    Args:
        report: called before each step of a fit.

    Raises:
        ValueError, OSError, FloatingPointError: as `segment`, for this image.
        OutputError: a result cannot be written.
    """

    def step(number: int, labels: int, loss: float) -> None:
        report(number, plan.way.steps, f"{labels} labels, loss {loss:.3f}")

    picture = read_picture(job.source, plan.reading_of(job))
    pixels = picture.pixels
    rule = None if plan.mask is None else rule_of(plan, picture)
    result = plan.way.segment(pixels, rule, step)
    record = {
        "source": printable(os.path.realpath(job.source)),
        "sha256": fingerprint(job.source),
        "settings": settings_record(plan),
        "size": list(result.labels.shape),
        "read": picture.facts,
        **result.record,
    }
    if rule is not None:
        record["rule"] = rule
    remove(job.file(folder, ".json"))  # an older record is not that of the new files
    write_pictures(job, folder, pixels, result)
    if picture.slice is not None and job.slice_index is None:
        for kind in plan.kinds:
            write_nifti(job.file(folder, f".{kind}.nii.gz"), [(read_values(job, folder, kind), picture.slice)])
    write_json(job.file(folder, ".json"), record)
    return record


def rule_of(plan: Plan, picture: Picture) -> str:
    """The rule by which the mask of an image is made."""
    rule = plan.way.rule(plan.mask)
    if rule not in (None, AUTO):
        return str(rule)
    return rule_for(is_colour(prepare_image(picture.pixels)), picture.modality == "CT")
