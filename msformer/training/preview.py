"""What a training would do, without doing it: ``msformer train --dry-run``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msformer.io.files import find_images
from msformer.messages import say, tell, tell_at_end
from msformer.runs.plan import plan_jobs, settings_line
from msformer.segmentation import find_device
from msformer.training.domains import find_domain, guess_domain
from msformer.training.folder import TEACHERS, safe_reading_of
from msformer.training.kinds import Kind, look_at
from msformer.training.lessons import Request, unmade
from msformer.training.objectives import find_objective
from msformer.training.run import read_early, reading_for, settings_of


def preview(
    folders: Sequence[Path],
    out: Path,
    *,
    domain: str | None,
    objective: str,
    weights: Mapping[str, float] | None,
    learning_rate: float | None,
    window: tuple[float, float] | None,
    slice_index: int | None,
    modality: str | None,
    all_slices: bool,
    device: str,
    backend: str | None,
    workers: int | None,
    overwrite: bool,
    **more: Any,
) -> None:
    """Says which images a training would be taught by, with which settings and from which step on, and writes nothing.

    Args and errors are those of `msformer.training.run.train`, as far as they are known before an image is read.
    """
    chosen = find_objective(objective, weights)
    settings = settings_of(chosen, domain, learning_rate, find_device(device).type, backend, **more)
    settings.check_split(processes=1)
    state = None if overwrite else read_early(out, settings)
    sources = find_images(folders, exclude=[out])
    jobs = plan_jobs(sources, folders, out / TEACHERS, all_slices)
    reading = reading_for(domain, window, slice_index, modality)
    of = guess_domain(look_at(jobs, reading) or [Kind(False, False)]) if domain is None else find_domain(domain)
    record = settings.record() | {"domain": of.name}
    requests = [Request(job, safe_reading_of(job, reading), of, chosen.taught, settings.seed) for job in jobs]
    to_make = {request.job.name for request in unmade(requests, out / TEACHERS)}
    tell("start", images=len(jobs), out=out, settings=record, dry_run=True)
    for job in jobs:
        there = job.name not in to_make
        say(f"{job.origin}: {'what its teachers say is there' if there else 'its teachers would be asked'}")
        status = "would skip" if there else "would run"
        tell("image", name=job.name, source=job.source, slice=job.slice_index, status=status)
    done = 0 if state is None else (state.round - 1) * settings.steps + state.step
    total = settings.steps * settings.rounds
    say(f"settings: {settings_line(record)}")
    say(f"would train on {len(jobs)} images from step {done} to {total} into {out}; nothing was written")
    counts = {"images": len(jobs), "done": len(to_make), "skipped": len(jobs) - len(to_make), "failed": 0}
    tell_at_end(dry_run=True, counts=counts, out=out, steps={"done": done, "total": total})
