"""``msformer segment``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from msformer.commands.base import DONE, FAILED, Command
from msformer.messages import warn
from msformer.options import (
    ALL_SLICES,
    cluster_options,
    dry_run_option,
    fit_options,
    make_executor,
    make_way,
    modality_option,
    run_options,
    slice_option,
    window_option,
)


@click.command(cls=Command)
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the results.")
@run_options
@dry_run_option
@click.option("--mask", is_flag=True, help="Write a mask of the object, too.")
@click.option(
    "--select",
    type=click.Choice(["auto", "central", "dark", "lesion", "lung"]),
    default="auto",
    show_default=True,
    help="Rule by which the mask is made.",
)
@window_option
@slice_option
@modality_option
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="Trained model to ask instead of a fit: its folder, or ORG/NAME of the Hugging Face Hub.",
)
@click.option("--refine", is_flag=True, help="With --model: fit each image as well, and fuse both.")
@cluster_options
@fit_options(size=None)
def segment(
    paths: tuple[Path, ...],
    out: Path,
    overwrite: bool,
    at_once: int | None,
    dry_run: bool,
    mask: bool,
    select: str,
    window: tuple[float, float] | None,
    slice: int | str | None,
    modality: str | None,
    model: Path | None,
    refine: bool,
    cluster: str | None,
    threads: int | None,
    **options: Any,
) -> None:
    """Segment image files, and all images in folders and their subfolders.

    PNG, JPEG, TIFF, BMP, GIF, WebP, AVIF, HEIC, JPEG 2000, PNM, DICOM and NIfTI are read.

    Writes for each image an indexed label map, a colour overlay and a record; for all, report.html, contact sheets and
    summary.json.
    With --mask also a binary mask of the object, made by the rule of --select: lesion for dermoscopy, dark for other
    dark objects, lung for CT of the chest, central for anything else; auto takes lesion for colour images, lung for
    CT, central for other grey ones.
    Label maps and masks of DICOM and NIfTI files are written as NIfTI, too; with --slice all, whole volumes. Files
    that do not say their modality are taken for CT by --modality CT, not by their values.
    With --model a network that was trained on such images is asked, in a moment, in place of the fit; the object's
    probability is written, too, and the record says how sure the network was and what decided the mask.
    Images that are already done with the same settings are skipped, so an interrupted run goes on where it stopped.
    With --cluster the images are tasks of Ray, each with --threads; --at-once then limits the tasks under way.
    """
    if select != "auto" and not mask:
        raise click.UsageError("--select is for --mask, which is not given")
    from msformer.claim import claimed
    from msformer.commands.running import finish, images_at_once, preview, run_all
    from msformer.io.files import find_images
    from msformer.io.read import Reading
    from msformer.runs.plan import Plan, plan_jobs
    from msformer.runs.write import read_mask, write_volumes

    way = make_way(options, model, refine)
    reading = Reading(window, slice if isinstance(slice, int) else None, modality)
    plan = Plan(way, reading, select if mask else None)
    executor = make_executor(cluster, threads, way.device, at_once, images_at_once(way.device))
    sources = find_images(paths, exclude=[out])
    all_slices = slice == ALL_SLICES
    if dry_run:
        jobs = plan_jobs(sources, paths, out, all_slices)
        sys.exit(FAILED if preview(jobs, out, plan, overwrite) else DONE)
    with claimed(out):
        jobs = plan_jobs(sources, paths, out, all_slices)
        doubts = way.doubts(jobs, reading)
        for doubt in doubts:
            warn(doubt)
        run = run_all(jobs, out, plan, overwrite, executor)
        run.failures |= write_volumes([job for job in jobs if job.name in run.finished], out, plan)
        drawn: dict[str, Any] = {"warnings": doubts} if doubts else {}
        if mask:
            drawn |= {"mask": lambda job: read_mask(job, out), "border": "border of the mask"}
        finish(jobs, run, out, plan, **drawn, **executor.facts)
    sys.exit(FAILED if run.failures else DONE)
