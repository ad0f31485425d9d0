"""What kind an image is of: colour, grey, or computed tomography."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from msformer.io.prepare import prepare_image
from msformer.io.read import Reading, is_colour, is_ct, read_image
from msformer.runs.plan import Job, reading_of

SAMPLE = 25
"""Images that are looked at for the kind of most of a folder."""
RARE = 0.05
"""A folder mixes kinds if more of its images than this are of another kind than most."""


class Kind(NamedTuple):
    """What is known of an image without looking for an object."""

    colour: bool
    ct: bool

    def __str__(self) -> str:
        return "colour" if self.colour else "CT" if self.ct else "grey"


def kind_of(job: Job, reading: Reading, image: Tensor) -> Kind:
    """The kind of an image ``[3, H, W]`` that was read from the file of a job."""
    return Kind(is_colour(image), is_ct(job.source, reading))


def look_at(jobs: Sequence[Job], reading: Reading, count: int = SAMPLE) -> list[Kind]:
    """The kinds of some of the images, spread over the folder; files that cannot be read are passed over."""
    found = []
    for place in np.unique(np.linspace(0, len(jobs) - 1, min(count, len(jobs))).astype(int)):
        job = jobs[place]
        try:
            how = reading_of(job, reading)
            found.append(kind_of(job, how, prepare_image(read_image(job.source, how))))
        except (ValueError, OSError):
            continue
    return found


def count_kinds(kinds: Iterable[Kind]) -> dict[str, int]:
    """How many images there are of each kind, the most frequent first."""
    return dict(Counter(map(str, kinds)).most_common())


def strangers(kinds: Sequence[Kind], trained: Mapping[str, Any]) -> str | None:
    """A warning, if most images are of a kind that a network was hardly trained on.

    Args:
        kinds: of some of the images.
        trained: images of each kind that the network was trained on, as `count_kinds` counts them.
    """
    if not kinds or not trained:
        return None
    most = next(iter(count_kinds(kinds)))
    if trained.get(most, 0) > RARE * sum(trained.values()):
        return None
    return (
        f"most of these images are {most}, but the model was trained on images that are {' or '.join(trained)}: look "
        "at some masks before you rely on any, or train a model on images like these"
    )
