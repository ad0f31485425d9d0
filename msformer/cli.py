"""The command line: ``msformer segment``, ``train``, ``evaluate``, ``demo``, ``info``.

Heavy imports happen inside the commands, so that help and errors of usage come at once.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from msformer.options import (
    ALL_SLICES,
    SliceType,
    cluster_options,
    fit_options,
    make_executor,
    make_fit,
    make_way,
    modality_option,
    needed_packages,
    run_options,
)
from msformer.text import plain_warnings, say
from msformer.training.command import train

if TYPE_CHECKING:
    from msformer.runs.executors import Executor
    from msformer.runs.plan import Job, Plan
    from msformer.runs.ways import Record

INTERRUPTED = 130  # as a shell reports a program that Ctrl-C ended


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="msformer")
def main() -> None:
    """MS-Former segments medical images without labels, by fitting a small transformer to each image."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may hold what a terminal cannot show


@main.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the results.")
@run_options
@click.option("--mask", is_flag=True, help="Write a mask of the object, too.")
@click.option(
    "--select",
    type=click.Choice(["auto", "central", "dark", "lesion", "lung"]),
    default="auto",
    show_default=True,
    help="Rule by which the mask is made.",
)
@click.option("--window", type=(float, float), default=None, help="Values that become black and white. [default: auto]")
@click.option(
    "--slice", type=SliceType(), default=None, help="Of NIfTI volumes and DICOM frames; 'all': each. [default: middle]"
)
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
    """Segment image files, and all images in folders and their subfolders: PNG, JPEG, BMP, TIFF, DICOM, NIfTI.

    Writes for each image an indexed label map, a colour overlay and a record; for all, contact sheets and summary.json.
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
    with friendly_errors():
        from msformer.claim import claimed
        from msformer.io.files import find_images
        from msformer.io.read import Reading
        from msformer.runs.plan import Plan, plan_jobs
        from msformer.runs.write import read_mask, write_volumes

        way = make_way(options, model, refine)
        reading = Reading(window, slice if isinstance(slice, int) else None, modality)
        plan = Plan(way, reading, select if mask else None)
        executor = make_executor(cluster, threads, way.device, at_once, images_at_once(way.device))
        sources = find_images(paths, exclude=[out])
        with claimed(out):
            jobs = plan_jobs(sources, paths, out, all_slices=slice == ALL_SLICES)
            doubts = way.doubts(jobs, reading)
            for doubt in doubts:
                say(f"warning: {doubt}", err=True)
            finished, failures = run_all(jobs, out, plan, overwrite, executor)
            failures |= write_volumes([job for job in jobs if job.name in finished], out, plan)
            drawn: dict[str, Any] = {"warnings": doubts} if doubts else {}
            if mask:
                drawn |= {"mask": lambda job: read_mask(job, out), "border": "border of the mask"}
            finish(jobs, finished, failures, out, plan, **drawn, **executor.facts)
    sys.exit(1 if failures else 0)


@main.command()
@click.option(
    "--out", default="demo", show_default=True, type=click.Path(path_type=Path), help="Folder for the results."
)
@click.option("--count", type=click.IntRange(1), default=4, show_default=True, help="Images.")
@run_options
@fit_options(size=129, max_steps=30)
def demo(out: Path, count: int, overwrite: bool, at_once: int | None, **options: Any) -> None:
    """Segment images that the package makes itself, with known masks, and print scores: first those of the masks that
    a user gets, then those of the label that fits the true mask best.

    The images look like dermoscopy from afar; they and their masks are kept in OUT/images and OUT/masks. The fitted
    size is smaller than that of `segment`, and the steps are fewer, to be quick.
    """
    with friendly_errors():
        from msformer.claim import claimed
        from msformer.demo import make_images, print_scores, score_all
        from msformer.io.read import Reading
        from msformer.runs.executors import Local
        from msformer.runs.plan import Plan, plan_jobs
        from msformer.runs.write import read_mask
        from msformer.selection import AUTO

        seed = options["seed"]
        plan = Plan(make_fit(options), Reading(), AUTO)
        executor = Local(at_once or images_at_once(plan.way.device))
        with claimed(out):
            sources, masks = make_images(out, count, seed)
            jobs = plan_jobs(sources, [out / "images"], out)
            finished, failures = run_all(jobs, out, plan, overwrite, executor)
            scores = score_all(finished, masks, out)
            finish(
                jobs,
                finished,
                failures,
                out,
                plan,
                caption=lambda job, record: f"{plan.way.caption(record)}, DSC {100 * scores[job.name].blind:.0f}",
                mask=lambda job: masks[job.name],
                found=lambda job: read_mask(job, out),
                scores={name: value._asdict() for name, value in scores.items()},
            )
        print_scores(scores)
    sys.exit(1 if failures else 0)


def list_methods(context: click.Context, option: click.Parameter, value: str) -> str:
    """Prints the methods instead of running the command, if that is asked for."""
    if value == "list":
        with friendly_errors(), needed_packages("evaluate"):
            from msformer.baselines import all_methods

            for method in all_methods():
                click.echo(f"{method.name:<20} {method.title}")
        context.exit()
    return value


@main.command()
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Folder of images and masks.")
@click.option("--masks", default=None, type=click.Path(path_type=Path), help="Folder of masks, if not below --data.")
@click.option("--layout", default="auto", show_default=True, help="ph2, lung, isic or pairs.")
@click.option(
    "--methods",
    default="all",
    show_default=True,
    is_eager=True,
    callback=list_methods,
    help="Names, joined by commas; 'list' prints them. The folder of a trained model, MODEL/, is one, too.",
)
@click.option("--ablation", is_flag=True, help="MS-Former with some of its losses (table 2) instead of all methods.")
@click.option(
    "--select", default="auto", show_default=True, help="Rule of the blind score: central, dark, lesion, lung."
)
@click.option("--limit", type=click.IntRange(1), default=None, help="Images at most.")
@click.option(
    "--label", multiple=True, help="Number or #rrggbb of the object in masks of several labels; repeat it, or 'all'."
)
@click.option("--window", type=(float, float), default=None, help="Values that become black and white. [default: auto]")
@modality_option
@click.option(
    "--size", type=click.IntRange(33), default=257, show_default=True, help="Side of the fitted image, pixels."
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--backend", default=None, help="Of the kernels: reference, native, ... [default: the fastest]")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the report.")
@cluster_options
def evaluate(**options: Any) -> None:
    """Score MS-Former and the methods it is compared with on images with true masks.

    A trained model is scored by the masks of `msformer segment --model MODEL/ --mask`; MODEL/:net is its network alone.

    Writes report.html and report.md, summary.csv, scores.csv (a line an image, method and protocol) and the label maps.
    What is done is not done again, so an interrupted run goes on where it stopped.
    """
    with friendly_errors(), needed_packages("evaluate"):
        from msformer.evaluation.command import run

        failures = run(**options)
    sys.exit(1 if failures else 0)


main.add_command(train)


@main.command()
def info() -> None:
    """Print versions, the machine, and which backends are used and why."""
    import os
    import platform

    import torch

    import msformer
    import msformer_kernels

    click.echo(f"msformer {msformer.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    click.echo(f"{platform.platform()}, {_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    click.echo(f"GPU: {', '.join(gpus) if gpus else 'none that torch can use'}")
    with friendly_errors():
        for device in ("cpu", "cuda") if gpus else ("cpu",):
            click.echo(f"\nbackends for {msformer_kernels.explain(device)}")


def _cpu_name() -> str:
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@contextmanager
def friendly_errors() -> Iterator[None]:
    """Turns errors that a user can do something about into a line on stderr and exit code 1; Ctrl-C into 130."""
    try:
        with plain_warnings():
            yield
    except KeyboardInterrupt:
        message = "interrupted; finished images are complete, the same command goes on where it stopped"
        click.echo(f"\n{message}", err=True)
        sys.exit(INTERRUPTED)
    except (ValueError, OSError, RuntimeError) as error:
        from msformer_kernels import BackendError

        if isinstance(error, RuntimeError) and not isinstance(error, BackendError):
            raise
        say(f"error: {error}", err=True)
        sys.exit(1)


def run_all(
    jobs: list[Job], out: Path, plan: Plan, overwrite: bool, executor: Executor
) -> tuple[dict[str, Record], dict[str, str]]:
    """Segments what is not done yet; returns the records by name, and the errors by origin."""
    from functools import partial

    from torch import OutOfMemoryError

    from msformer.output import NameRefused, OutputError
    from msformer.progress import RunProgress
    from msformer.runs.execute import done_before, run_job
    from msformer_kernels import BackendError

    finished: dict[str, Record] = {}
    failures: dict[str, str] = {}

    @contextmanager
    def of_image(job: Job) -> Iterator[None]:
        """What goes wrong with an image is said and does not end the run."""
        try:
            yield
        except (OutputError, BackendError) as error:
            if not isinstance(error, NameRefused):
                raise
            failed(job, error)
        except (ValueError, OSError, FloatingPointError, OutOfMemoryError, MemoryError) as error:
            failed(job, error)

    def failed(job: Job, error: Exception) -> None:
        failures[job.origin] = str(error) or type(error).__name__
        progress.ended(job.name, f"failed: {failures[job.origin]}")

    def settled(job: Job) -> bool:
        """Whether there is nothing to make, as the image was done before, or cannot be read."""
        with of_image(job):
            plan.check_names(job, out)  # before minutes of a fit
            record = None if overwrite else done_before(job, out, plan)
            if record is None:
                progress.begin()
                return False
            progress.skipped()
            finished[job.name] = record
        return True

    work = partial(run_job, plan=plan)
    with executor, RunProgress(len(jobs)) as progress:
        to_make = (job for job in jobs if not settled(job))
        with closing(executor.run(work, to_make, out, lambda job: progress.start(job.name))) as outcomes:
            for job, outcome in outcomes:
                with of_image(job):
                    record = outcome.result()
                    progress.ended(job.name, plan.way.outcome(record))
                    finished[job.name] = record
    return finished, {job.origin: failures[job.origin] for job in jobs if job.origin in failures}


def images_at_once(device: str) -> int:
    """One fit fills the CPU; whether four fill a GPU has not been measured yet."""
    return 4 if device.startswith("cuda") else 1


def finish(
    jobs: list[Job],
    finished: dict[str, Record],
    failures: dict[str, str],
    out: Path,
    plan: Plan,
    caption: Callable[[Job, Record], str] | None = None,
    mask: Callable[[Job], Any] = lambda job: None,
    border: str = "true border",
    found: Callable[[Job], Any] = lambda job: None,
    **more: Any,
) -> None:
    """Contact sheets, summary, and a last line that says where everything is."""
    from msformer.runs.plan import settings_record
    from msformer.runs.write import write_sheets, write_summary

    caption = caption or (lambda job, record: plan.way.caption(record))
    complete = [job for job in jobs if job.name in finished]
    records = [finished[job.name] for job in complete]
    sheets, not_drawn = (
        write_sheets(complete, records, out, plan, caption, mask, border, found) if complete else ([], {})
    )
    write_summary(complete, records, failures, out, settings_record(plan), **more)
    for what, errors in (("failed", failures), ("not on a contact sheet", not_drawn)):
        for source, error in errors.items():
            say(f"{what}: {error if source in error else f'{source}: {error}'}", err=True)
    pictures = ", ".join(sheet.name for sheet in sheets) or "no pictures"
    say(f"{len(complete)} of {len(jobs)} images in {out}: {pictures}, summary.json")
