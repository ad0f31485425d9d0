"""A run over many images, as `segment` and `demo` make it: what is done already, what fails, what is told of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import OutOfMemoryError

from msformer.messages import complain, say, tell, tell_at_end
from msformer.output import NameRefused, OutputError
from msformer.progress import RunProgress
from msformer.runs.execute import done_before, run_job
from msformer.runs.executors import Executor
from msformer.runs.plan import Job, Plan, settings_line, settings_record
from msformer.runs.report import Page, write_pictures_of_all
from msformer.runs.ways import Record
from msformer.runs.write import write_summary
from msformer_kernels import BackendError

_OF_AN_IMAGE = (ValueError, OSError, FloatingPointError, OutOfMemoryError, MemoryError)
"""What may go wrong with one image and leaves the others as they are."""


@dataclass
class Run:
    """What became of the images."""

    finished: dict[str, Record] = field(default_factory=dict)
    """The records by name."""
    failures: dict[str, str] = field(default_factory=dict)
    """The errors by origin."""
    skipped: int = 0
    """Images that were done before, of those finished."""


def run_all(jobs: list[Job], out: Path, plan: Plan, overwrite: bool, executor: Executor) -> Run:
    """Segments what is not done yet."""
    run = Run()
    tell("start", images=len(jobs), out=out, settings=settings_record(plan))

    @contextmanager
    def of_image(job: Job) -> Iterator[None]:
        """What goes wrong with an image is said and does not end the run."""
        try:
            yield
        except (*_OF_AN_IMAGE, BackendError) as error:
            if isinstance(error, OutputError | BackendError) and not isinstance(error, NameRefused):
                raise
            reason = run.failures[job.origin] = str(error) or type(error).__name__
            progress.ended(job.name, f"failed: {reason}")
            _tell_of(job, "failed", error=reason)

    def settled(job: Job) -> bool:
        """Whether there is nothing to make, as the image was done before, or cannot be read."""
        with of_image(job):
            plan.check_names(job, out)  # before minutes of a fit
            record = None if overwrite else done_before(job, out, plan)
            if record is None:
                progress.begin()
                return False
            progress.skipped()
            run.finished[job.name] = record
            run.skipped += 1
            _tell_of(job, "skipped", files=_files(job, plan), record=record)
        return True

    work = partial(run_job, plan=plan)
    with executor, RunProgress(len(jobs)) as progress:
        to_make = (job for job in jobs if not settled(job))
        with closing(executor.run(work, to_make, out, lambda job: progress.start(job.name))) as outcomes:
            for job, outcome in outcomes:
                with of_image(job):
                    record = outcome.result()
                    progress.ended(job.name, plan.way.outcome(record))
                    run.finished[job.name] = record
                    _tell_of(job, "done", files=_files(job, plan), record=record)
    run.failures = {job.origin: run.failures[job.origin] for job in jobs if job.origin in run.failures}
    return run


def _tell_of(job: Job, status: str, **facts: Any) -> None:
    tell("image", name=job.name, source=job.source, slice=job.slice_index, status=status, **facts)


def _files(job: Job, plan: Plan) -> list[str]:
    """What an image gets, as paths in the folder of the run."""
    return [f"{job.name}{suffix}" for suffix in (*plan.suffixes(job), ".json")]


def images_at_once(device: str) -> int:
    """One fit fills the CPU; whether four fill a GPU has not been measured yet."""
    return 4 if device.startswith("cuda") else 1


def preview(jobs: list[Job], out: Path, plan: Plan, overwrite: bool) -> dict[str, str]:
    """Says what a run would do, and writes nothing; returns the errors of images whose results cannot be written."""
    settings = settings_record(plan)
    tell("start", images=len(jobs), out=out, settings=settings, dry_run=True)
    failures: dict[str, str] = {}
    skipped = 0
    for job in jobs:
        try:
            plan.check_names(job, out)
            done = not overwrite and done_before(job, out, plan) is not None
        except _OF_AN_IMAGE as error:
            failures[job.origin] = str(error) or type(error).__name__
            complain(f"would fail: {_named(job.origin, failures[job.origin])}")
            _tell_of(job, "would fail", error=failures[job.origin])
            continue
        skipped += done
        files = _files(job, plan)
        say(f"{job.origin}: {'done already' if done else 'would write ' + ', '.join(files)}")
        _tell_of(job, "would skip" if done else "would run", files=files)
    made = len(jobs) - skipped - len(failures)
    say(f"settings: {settings_line(settings)}")
    say(f"would segment {made} of {len(jobs)} images into {out}, skip {skipped}; nothing was written")
    tell_at_end(
        dry_run=True, counts={"images": len(jobs), "done": made, "skipped": skipped, "failed": len(failures)}, out=out
    )
    return failures


def _named(origin: str, error: str) -> str:
    """An error with what it is about."""
    return error if origin in error else f"{origin}: {error}"


def finish(
    jobs: list[Job],
    run: Run,
    out: Path,
    plan: Plan,
    caption: Callable[[Job, Record], str] | None = None,
    mask: Callable[[Job], Any] = lambda job: None,
    border: str = "true border",
    found_mask: Callable[[Job], Any] = lambda job: None,
    **more: Any,
) -> None:
    """Summary, contact sheets and report, and a last line that says where everything is."""
    caption = caption or (lambda job, record: plan.way.caption(record))
    complete = [job for job in jobs if job.name in run.finished]
    records = [run.finished[job.name] for job in complete]
    write_summary(complete, records, run.failures, out, settings_record(plan), **more)
    failures = {source: error.removeprefix(f"{source}: ") for source, error in run.failures.items()}
    page = Page(settings_record(plan), failures, more.get("warnings", []), caption, mask, border, found_mask)
    sheets, not_drawn = write_pictures_of_all(complete, records, out, plan, page)
    for what, errors in (("failed", run.failures), ("not in the pictures of all", not_drawn)):
        for source, error in errors.items():
            complain(f"{what}: {_named(source, error)}")
    files = [*(sheet.name for sheet in sheets), "report.html", "summary.json"]
    say(f"{len(complete)} of {len(jobs)} images in {out}: {', '.join(files)}")
    counts = {"images": len(jobs), "done": len(complete) - run.skipped, "skipped": run.skipped}
    tell_at_end(counts=counts | {"failed": len(run.failures)}, out=out, files=files)
