"""The command line: ``msformer segment``, ``msformer demo``, ``msformer info``.

Heavy imports happen inside the commands, so that help and errors of usage come at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from msformer.runs import Job, Record

Command = TypeVar("Command", bound=Callable[..., Any])
INTERRUPTED = 130  # as a shell reports a program that Ctrl-C ended


def run_options(command: Command) -> Command:
    """The options of a run over many images."""
    at_once = "Images that are fitted at the same time. [default: 1 on the CPU, 4 on a GPU]"
    command = click.option("--at-once", type=click.IntRange(1), default=None, help=at_once)(command)
    return click.option("--overwrite", is_flag=True, help="Segment again what is already done.")(command)


def fit_options(size: int) -> Callable[[Command], Command]:
    """The options of the fit, shared by the commands that segment."""
    options = [
        click.option(
            "--size", type=click.IntRange(33), default=size, show_default=True, help="Side of the fitted image, pixels."
        ),
        click.option("--max-steps", type=click.IntRange(1), default=50, show_default=True, help="Steps at most."),
        click.option(
            "--min-labels", type=click.IntRange(1), default=3, show_default=True, help="Stop at this many labels."
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Of the initial weights."),
        click.option(
            "--ce", type=click.FloatRange(0), default=1.0, show_default=True, help="Weight of the cross-entropy."
        ),
        click.option(
            "--inter", type=click.FloatRange(0), default=1.5, show_default=True, help="Weight of the inter-scale loss."
        ),
        click.option(
            "--intra", type=click.FloatRange(0), default=1.3, show_default=True, help="Weight of the intra-scale loss."
        ),
        click.option("--embed-dim", type=click.IntRange(1), default=100, show_default=True, help="Width of the model."),
        click.option("--depth", type=click.IntRange(1), default=2, show_default=True, help="Blocks a branch."),
        click.option("--learning-rate", type=click.FloatRange(0, min_open=True), default=0.1, show_default=True),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ..."),
        click.option("--backend", default=None, help="Of the kernels: reference, native, ... [default: the fastest]"),
    ]

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def segment_arguments(values: dict[str, Any]) -> dict[str, Any]:
    """Options of the command line -> keyword arguments of `msformer.segment`, device and backend as they turn out.

    A backend that cannot be had is thereby an error of its own, not one of every image, and a finished image counts as
    done only for the backend and device that it was made with.
    """
    from torch import float32

    from msformer.losses import LossWeights
    from msformer.segmentation import find_device
    from msformer_kernels.backends import resolve

    weights = LossWeights(*(values.pop(name) for name in ("ce", "inter", "intra")))
    device = find_device(values["device"])
    backend = resolve(values["backend"], device.type, float32)
    return values | {"weights": weights, "device": str(device), "backend": backend}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="msformer")
def main() -> None:
    """MS-Former segments medical images without labels, by fitting a small transformer to each image."""


@main.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the results.")
@run_options
@fit_options(size=257)
def segment(paths: tuple[Path, ...], out: Path, overwrite: bool, at_once: int | None, **options: Any) -> None:
    """Segment image files, and all images in folders and their subfolders.

    Writes for each image an indexed label map, a colour overlay and a record; for all, contact sheets and summary.json.
    Images that are already done with the same settings are skipped, so an interrupted run goes on where it stopped.
    """
    with friendly_errors():
        from msformer.data import find_images
        from msformer.runs import plan_jobs

        arguments = segment_arguments(options)
        sources = find_images(paths, exclude=out)
        jobs = plan_jobs(sources, paths, out)
        finished, failures = run_all(jobs, out, arguments, overwrite, at_once)
        finish(jobs, finished, failures, out, arguments)
    sys.exit(1 if failures else 0)


@main.command()
@click.option(
    "--out", default="demo", show_default=True, type=click.Path(path_type=Path), help="Folder for the results."
)
@click.option("--count", type=click.IntRange(1), default=6, show_default=True, help="Images.")
@run_options
@fit_options(size=129)
def demo(out: Path, count: int, overwrite: bool, at_once: int | None, **options: Any) -> None:
    """Segment images that the package makes itself, with known masks, and print scores.

    The images look like dermoscopy from afar; they and their masks are kept in OUT/images and OUT/masks. The fitted
    size is smaller than that of `segment`, to be quick.
    """
    with friendly_errors():
        from msformer.demo import make_images, print_scores, score_all
        from msformer.runs import plan_jobs

        arguments = segment_arguments(options)
        sources, masks = make_images(out, count, arguments["seed"])
        jobs = plan_jobs(sources, [out / "images"], out)
        finished, failures = run_all(jobs, out, arguments, overwrite, at_once)
        scores = score_all(finished, masks, out)
        finish(
            jobs,
            finished,
            failures,
            out,
            arguments,
            caption=lambda job, record: f"{caption(job, record)}, DSC {100 * scores[job.name].oracle:.0f}",
            mask=lambda job: masks[job.name],
            scores={name: value._asdict() for name, value in scores.items()},
        )
        print_scores(scores)
    sys.exit(1 if failures else 0)


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
        yield
    except KeyboardInterrupt:
        message = "interrupted; finished images are complete, the same command goes on where it stopped"
        click.echo(f"\n{message}", err=True)
        sys.exit(INTERRUPTED)
    except (ValueError, OSError, RuntimeError) as error:
        from msformer_kernels import BackendError

        if isinstance(error, RuntimeError) and not isinstance(error, BackendError):
            raise
        click.echo(f"error: {error}", err=True)
        sys.exit(1)


def caption(job: Job, record: Record) -> str:
    return f"{record['labels']} labels, {record['steps']} steps"


def run_all(
    jobs: list[Job], out: Path, arguments: dict[str, Any], overwrite: bool, at_once: int | None
) -> tuple[dict[str, Record], dict[str, str]]:
    """Segments what is not done yet; returns the records by name, and the errors by source."""
    from torch import OutOfMemoryError

    from msformer.output import OutputError, prepare_folder
    from msformer.progress import RunProgress
    from msformer.runs import done_before, for_each, run_job, settings_record
    from msformer_kernels import BackendError

    prepare_folder(out)
    settings = settings_record(arguments)
    finished: dict[str, Record] = {}
    failures: dict[str, str] = {}

    def segment_one(job: Job, check: Callable[[], None]) -> None:
        try:
            record = None if overwrite else done_before(job, out, settings)
            if record is not None:
                progress.skipped()
            else:
                record = run_job(job, out, arguments, progress.start(job.name, check))
                progress.finished(job.name, record)
            finished[job.name] = record
        except (OutputError, BackendError):
            raise
        except (ValueError, OSError, FloatingPointError, OutOfMemoryError) as error:
            failures[str(job.source)] = str(error)
            progress.failed(job.name, str(error))

    with RunProgress(len(jobs), arguments["max_steps"]) as progress:
        for_each(jobs, segment_one, at_once or images_at_once(arguments["device"]))
    return finished, {str(job.source): failures[str(job.source)] for job in jobs if str(job.source) in failures}


def images_at_once(device: str) -> int:
    """One fit does not fill a GPU: each kernel of it is short. On the CPU it does."""
    return 4 if device.startswith("cuda") else 1


def finish(
    jobs: list[Job],
    finished: dict[str, Record],
    failures: dict[str, str],
    out: Path,
    arguments: dict[str, Any],
    caption: Callable[[Job, Record], str] = caption,
    mask: Callable[[Job], Any] = lambda job: None,
    **more: Any,
) -> None:
    """Contact sheets, summary, and a last line that says where everything is."""
    from msformer.runs import settings_record, write_sheets, write_summary

    complete = [job for job in jobs if job.name in finished]
    records = [finished[job.name] for job in complete]
    sheets = write_sheets(complete, records, out, caption, mask) if complete else []
    write_summary(complete, records, failures, out, settings_record(arguments), **more)
    for source, error in failures.items():
        click.echo(f"failed: {error if source in error else f'{source}: {error}'}", err=True)
    pictures = ", ".join(sheet.name for sheet in sheets) or "no pictures"
    click.echo(f"{len(complete)} of {len(jobs)} images in {out}: {pictures}, summary.json")
