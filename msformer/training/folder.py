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
from msformer.runs.plan import Job, plan_jobs, reading_of
from msformer.training.distributed import Processes
from msformer.training.domains import Domain, Kind, find_domain, guess_domain
from msformer.training.lessons import Lesson, Pool, Request, learn, look_at, make_pool
from msformer.training.settings import FEW_IMAGES
from msformer.training.teachers import AGREEMENT
from msformer.training.watch import Watch

TEACHERS = "teachers"
"""Folder of the lessons, below that of the model."""
MIXED = 0.05
"""A folder mixes kinds if more of its images than this are of another kind than most."""


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
    images = [(job, _reading_of(job, reading)) for job in plan_jobs(sources, paths, out / TEACHERS, all_slices)]
    chosen = guess_domain(look_at(images) or [Kind(False, False)]) if domain is None else find_domain(domain)
    with Watch("images", len(images), shown=shown) as watch:
        if domain is None:
            watch.say(f"domain: {chosen.name}, as most images look; --domain says otherwise")
        requests = [Request(job, how, chosen, taught, seed) for job, how in images]
        lessons, failures = learn(requests, out / TEACHERS, watch.update, processes, workers)
    if not lessons:
        raise ValueError(f"every image failed, the first with: {next(iter(failures.values()))}")
    kept = {name: lesson for name, lesson in lessons.items() if lesson.agreement >= AGREEMENT}
    if not kept:
        raise ValueError(
            f"domain: the teachers of {chosen.name} disagree on all of {len(lessons)} images; expected images of that "
            "kind: try another --domain, or --objective consistency, which needs no teachers"
        )
    disagreed = tuple(name for name in lessons if name not in kept)
    warnings = tuple(concerns(chosen, [lesson.kind for lesson in lessons.values()], len(kept), failures))
    return Material(chosen, domain is None, kept, make_pool(kept, chosen.sight), disagreed, failures, warnings)


def concerns(domain: Domain, kinds: Sequence[Kind], kept: int, failures: Mapping[str, str]) -> Iterable[str]:
    """What a user should know before relying on the training, and what to do instead.

    Args:
        domain: of the training.
        kinds: of all images that were read.
        kept: images whose teachers agree.
        failures: error by file.
    """
    if kept < FEW_IMAGES:
        yield (
            f"{kept} images are few: from fewer than about {FEW_IMAGES} a network learns no more than its teachers "
            "know. Add images of the same kind, or fit each image instead: msformer segment --mask."
        )
    if kept < 0.5 * len(kinds):
        yield (
            f"The teachers disagree on {len(kinds) - kept} of {len(kinds)} images: the rule '{domain.rule}' of the "
            f"domain {domain.name} may not suit them. Look at some masks of it first (msformer segment --mask --select "
            f"{domain.rule}), try another --domain, or --objective consistency, which needs no teachers."
        )
    others = [kind for kind in kinds if kind != max(kinds, key=kinds.count)]
    if len(others) > MIXED * len(kinds):
        yield (
            f"{len(others)} of {len(kinds)} images are of another kind than most (colour, grey, CT): one network for "
            "several kinds learns none of them well. Put each kind in a folder of its own and train on each."
        )
    if failures:
        first = next(iter(failures.values()))
        yield f"{len(failures)} files cannot be read and are left out, the first: {first}"


def _reading_of(job: Job, reading: Reading) -> Reading:
    try:
        return reading_of(job, reading)
    except (ValueError, OSError):
        return reading  # reading the image will say what is wrong
