"""What a folder of images teaches: each image at working size with its teachers' target, kept on disk so that none is
made twice.

``<out>/teachers/<key>.npz`` is one image. The key is a hash of the file's content and of all that decides the lesson,
so what is there is right, whatever was in the folder before. Images are worked on in processes side by side where
there are enough to pay for starting them; several processes of one training share the work.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from joblib import Parallel, delayed
from numpy.typing import NDArray
from torch import Tensor

import msformer
from msformer.io.modality import hint
from msformer.io.prepare import prepare_image, resize_image
from msformer.io.read import Reading, read_image
from msformer.output import OutputError, complete_file
from msformer.runs.plan import Job, fingerprint
from msformer.training.distributed import ALONE, Processes, wait_for_all
from msformer.training.domains import Domain
from msformer.training.kinds import Kind, kind_of
from msformer.training.sight import STANDARDISED, Sight
from msformer.training.teachers import TEACHER_SIZE, rule_masks

FORMAT = 1
"""Of the files; a change of the teachers that their settings do not tell needs another."""
FEW = 30
"""Images that are worked on without further processes."""


@dataclass(frozen=True)
class Request:
    """One image, and what its lesson is made for."""

    job: Job
    reading: Reading
    """How its file is read."""
    domain: Domain
    taught: bool
    """Whether teachers are wanted."""
    seed: int


class Lesson(NamedTuple):
    """One image at working size, and what its teachers say."""

    image: NDArray[np.uint8]
    """``[3, S, S]``."""
    votes: NDArray[np.uint8]
    """``[S, S]``: how many teachers see the object; zeros without teachers."""
    teachers: int
    agreement: float
    """Mean Dice coefficient of pairs of teachers; 1 without teachers."""
    kind: Kind
    key: str

    @property
    def target(self) -> NDArray[np.uint8]:
        """``[S, S]``, 1 where most teachers see the object."""
        return (2 * self.votes > self.teachers).astype(np.uint8)

    @property
    def weight(self) -> NDArray[np.uint8]:
        """``[S, S]``, 255 where all teachers agree, 0 where half of them see the object."""
        share = np.abs(2.0 * self.votes - self.teachers) / max(self.teachers, 1)
        return np.rint(255 * share).astype(np.uint8)


@dataclass(frozen=True, eq=False)
class Pool:
    """The images that a network is trained on, in memory."""

    names: tuple[str, ...]
    images: Tensor
    """``[N, 3, S, S]``, uint8, painted as the network sees them."""
    target: Tensor
    """``[N, S, S]``, uint8, 0 or 1."""
    weight: Tensor
    """``[N, S, S]``, uint8, in units of 1/255."""

    def __len__(self) -> int:
        return len(self.names)


def learn(
    requests: Sequence[Request],
    folder: Path,
    report: Callable[[int], None],
    processes: Processes = ALONE,
    workers: int = 1,
) -> tuple[dict[str, Lesson], dict[str, str]]:
    """The lessons by name in the order of the requests, and errors by origin.

    Args:
        requests: the images.
        folder: for the files.
        report: called as ``report(done)`` while they are made.
        processes: those of this training, each of which makes its share.
        workers: processes at a time that this one starts.

    Raises:
        OutputError: the folder cannot be written to.
    """
    missing = unmade(requests, folder)
    report(len(requests) - len(missing))
    for done, _ in enumerate(_made(missing[processes.rank :: processes.count], folder, workers), start=1):
        report(min(len(requests), len(requests) - len(missing) + done * processes.count))
    wait_for_all()
    lessons, failures = {}, {}
    for request in requests:
        try:
            lessons[request.job.name] = _load(request, folder) or make_lesson(request, folder)
        except OutputError:  # an error of the run, not of the image
            raise
        except (ValueError, OSError) as error:
            failures[request.job.origin] = str(error)
    return lessons, failures


def unmade(requests: Sequence[Request], folder: Path) -> list[Request]:
    """Those without a file."""
    return [request for request in requests if not _path(request, folder).exists()]


def make_pool(lessons: dict[str, Lesson], sight: Sight = STANDARDISED, size: int = TEACHER_SIZE) -> Pool:
    """The lessons as tensors, their images painted."""
    shape = len(lessons), size, size
    pool = np.empty((shape[0], 3, size, size), np.uint8), np.empty(shape, np.uint8), np.empty(shape, np.uint8)
    for place, lesson in enumerate(lessons.values()):
        for whole, part in zip(pool, (_painted(lesson.image, sight), lesson.target, lesson.weight), strict=True):
            whole[place] = part
    images, target, weight = map(torch.from_numpy, pool)
    return Pool(tuple(lessons), images, target, weight)


def _painted(image: NDArray[np.uint8], sight: Sight) -> NDArray[np.uint8]:
    seen = sight.paint(torch.from_numpy(image).float() / 255)
    return (seen * 255).round().to(torch.uint8).numpy()


def make_lesson(request: Request, folder: Path) -> Lesson:
    """Makes a lesson and writes it.

    Raises:
        ValueError, OSError: the image cannot be read, or the lesson not written.
    """
    image = prepare_image(read_image(request.job.source, request.reading))
    kind = kind_of(request.job, request.reading, image)
    small = resize_image(image, (TEACHER_SIZE, TEACHER_SIZE))
    stored = (small * 255).round().to(torch.uint8)
    votes, count, agreement = np.zeros((TEACHER_SIZE, TEACHER_SIZE), np.uint8), 0, 1.0
    if request.taught:
        teachers = rule_masks(stored.float() / 255, request.domain, request.seed)
        votes, count, agreement = teachers.masks.sum(0, dtype=np.uint8), len(teachers.masks), teachers.agreement
    key = _key(request)
    with complete_file(_path(request, folder)) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file, image=stored.numpy(), votes=votes, teachers=count, agreement=agreement, kind=np.array(kind)
        )
    return Lesson(stored.numpy(), votes, count, agreement, kind, key)


def _made(requests: Sequence[Request], folder: Path, workers: int) -> Iterator[None]:
    """Makes the lessons; those that fail are left to be tried, and reported, when they are loaded."""
    if len(requests) <= FEW or workers == 1:
        for request in requests:
            _try_to_make(request, folder)
            yield
        return
    with Parallel(n_jobs=workers, return_as="generator_unordered") as pool:
        yield from pool(delayed(_try_to_make)(request, folder) for request in requests)


def _try_to_make(request: Request, folder: Path) -> None:
    try:
        make_lesson(request, folder)
    except (ValueError, OSError):
        return


def _load(request: Request, folder: Path) -> Lesson | None:
    """The lesson on disk; None if there is none, or it is damaged."""
    try:
        with np.load(_path(request, folder), allow_pickle=False) as stored:
            colour, ct = stored["kind"].tolist()
            return Lesson(
                stored["image"],
                stored["votes"],
                int(stored["teachers"]),
                float(stored["agreement"]),
                Kind(colour, ct),
                _key(request),
            )
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None


def _path(request: Request, folder: Path) -> Path:
    return folder / f"{_key(request)}.npz"


def _key(request: Request) -> str:
    """A hash of the file's content, and of all else that decides the lesson."""
    settings = {
        "format": FORMAT,
        "version": msformer.__version__,
        "file": _fingerprint(request.job.source),
        "suffix": request.job.source.suffix.lower(),
        "window": request.reading.window,
        "slice": request.reading.slice_index,
        "modality": request.reading.modality or hint(request.job.source)[0],
        "size": TEACHER_SIZE,
        "domain": request.domain.name if request.taught else None,
        "seed": request.seed if request.taught else None,
    }
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]


_fingerprints: dict[tuple[str, int, int], str] = {}


def _fingerprint(source: Path) -> str:
    """The hash of a file's content, computed once as long as its size and time stay the same; "" if there is none."""
    try:
        status = os.stat(source)
        known = os.fspath(source), status.st_size, status.st_mtime_ns
        if known not in _fingerprints:
            _fingerprints[known] = fingerprint(source)
        return _fingerprints[known]
    except OSError:
        return ""
