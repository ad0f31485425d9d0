"""From folders of images to what a network is trained on: finding them, the domain, their teachers, and warnings where
training is not likely to help.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from msformer.io.files import find_images
from msformer.io.read import Reading
from msformer.messages import tell
from msformer.runs.plan import Job, plan_jobs, reading_of
from msformer.training.distributed import Processes
from msformer.training.domains import Domain, find_domain, guess_domain
from msformer.training.kinds import RARE, Kind, count_kinds, look_at
from msformer.training.lessons import Lesson, Pool, Request, learn, make_pool
from msformer.training.settings import FEW_IMAGES
from msformer.training.teachers import AGREEMENT
from msformer.training.watch import Watch

NAMED = 10
"""Files that cannot be read and are named in a warning."""
TEACHERS = "teachers"
"""Folder of the lessons, below that of the model."""


@dataclass(frozen=True, eq=False)
class Material:
    """What a network is trained on."""

    domain: Domain
    guessed: bool
    """Whether the domain was."""
    lessons: Mapping[str, Lesson]
    """Of the images whose teachers agree, by name."""
    pool: Pool
    """The same, in memory."""
    disagreed: tuple[str, ...]
    """Images that are left out since their teachers disagree."""
    failures: Mapping[str, str]
    """Error by file."""
    warnings: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """For the model card."""
        values = self.pool.images.float().div_(255)
        return {
            "images": len(self.pool),
            "left out, since their teachers disagree": len(self.disagreed),
            "left out, since they cannot be read": len(self.failures),
            "kinds": count_kinds(lesson.kind for lesson in self.lessons.values()),
            "mean agreement of the teachers": float(np.mean([each.agreement for each in self.lessons.values()])),
            "mean of each channel": values.mean((0, 2, 3)).tolist(),
            "standard deviation of each channel": values.std((0, 2, 3)).tolist(),
        }


def gather(
    folders: Sequence[str | os.PathLike[str]],
    out: Path,
    *,
    domain: str | None,
    taught: bool,
    seed: int,
    reading: Reading,
    all_slices: bool,
    workers: int,
    processes: Processes,
    shown: bool,
) -> Material:
    """Reads all images and makes their lessons, or finds them in ``out / "teachers"``.

    Raises:
        ValueError: no image, or none that can be used.
        OSError: a folder that cannot be read, or `out` not be written to.
    """
    paths = [Path(folder) for folder in folders]
    sources = find_images(paths, exclude=[out])
    jobs = plan_jobs(sources, paths, out / TEACHERS, all_slices)
    chosen = guess_domain(look_at(jobs, reading) or [Kind(False, False)]) if domain is None else find_domain(domain)
    with Watch("images", len(jobs), shown=shown) as watch:
        if domain is None:
            watch.say(f"domain: {chosen.name}, as most images look; --domain says otherwise")
        requests = [Request(job, safe_reading_of(job, reading), chosen, taught, seed) for job in jobs]
        lessons, failures = learn(requests, out / TEACHERS, watch.update, processes, workers)
    if not lessons:
        raise ValueError(f"every image failed, the first with: {named(failures)[0]}")
    kept = {name: lesson for name, lesson in lessons.items() if lesson.agreement >= AGREEMENT}
    if not kept:
        raise ValueError(
            f"domain: the teachers of {chosen.name} disagree on all of {len(lessons)} images; expected images of that "
            "kind: try another --domain, or --objective consistency, which needs no teachers"
        )
    disagreed = tuple(name for name in lessons if name not in kept)
    for job in jobs:
        _tell_of(job, lessons.get(job.name), failures.get(job.origin))
    warnings = tuple(concerns(chosen, lessons, kept, failures))
    return Material(chosen, domain is None, kept, make_pool(kept, chosen.sight), disagreed, failures, warnings)


def _tell_of(job: Job, lesson: Lesson | None, error: str | None) -> None:
    facts: dict[str, Any] = {"name": job.name, "source": job.source, "slice": job.slice_index}
    if lesson is None:
        tell("image", **facts, status="failed", error=error)
    else:
        status = "done" if lesson.agreement >= AGREEMENT else "left out"
        record = {"agreement": lesson.agreement, "teachers": lesson.teachers, "kind": str(lesson.kind)}
        tell("image", **facts, status=status, record=record)


def concerns(
    domain: Domain, lessons: Mapping[str, Lesson], kept: Mapping[str, Lesson], failures: Mapping[str, str]
) -> Iterable[str]:
    """What a user should know before relying on the training, and what to do instead.

    Args:
        domain: of the training.
        lessons: of all images that were read, by name.
        kept: of those whose teachers agree.
        failures: error by file.
    """
    different = len({lesson.key for lesson in kept.values()})
    if different < len(kept):
        yield f"{len(kept) - different} of {len(kept)} images are copies of others: these count for as much more."
    if different < FEW_IMAGES:
        yield (
            f"{different} images are few: from fewer than about {FEW_IMAGES} a network learns no more than its "
            "teachers know. Add images of the same kind, or fit each image instead: msformer segment --mask."
        )
    if len(kept) < 0.5 * len(lessons):
        yield (
            f"The teachers disagree on {len(lessons) - len(kept)} of {len(lessons)} images: the rule '{domain.rule}' "
            f"of the domain {domain.name} may not suit them. Look at some masks of it first (msformer segment --mask "
            f"--select {domain.rule}), try another --domain, or --objective consistency, which needs no teachers."
        )
    blank = [name for name, lesson in kept.items() if lesson.teachers and lesson.target.mean() in (0, 1)]
    if len(blank) > 0.5 * len(kept):
        yield (
            f"In {len(blank)} of {len(kept)} images, such as {blank[0]}, the teachers see nothing or everything, which "
            "a network then learns. Look at the images, or try another --domain."
        )
    kinds = [lesson.kind for lesson in lessons.values()]
    most = max(kinds, key=kinds.count)
    others = [name for name, lesson in lessons.items() if lesson.kind != most]
    if len(others) > RARE * len(kinds):
        yield (
            f"{len(others)} of {len(kinds)} images, such as {others[0]}, are not {most} as most are: one network for "
            "several kinds learns none of them well. Put each kind in a folder of its own and train on each; masks "
            "are no images to train on."
        )
    if failures:
        count = "1 file" if len(failures) == 1 else f"{len(failures)} files"
        more = f"; and {len(failures) - NAMED} more" if len(failures) > NAMED else ""
        yield f"{count} cannot be read, and left out: {'; '.join(named(failures)[:NAMED])}{more}"


def named(failures: Mapping[str, str]) -> list[str]:
    """Errors by file, each with the name of its file."""
    return [error if origin in error else f"{origin}: {error}" for origin, error in failures.items()]


def safe_reading_of(job: Job, reading: Reading) -> Reading:
    """`reading_of`; of a file that cannot be read, as it was asked for."""
    try:
        return reading_of(job, reading)
    except (ValueError, OSError):
        return reading  # reading the image will say what is wrong
