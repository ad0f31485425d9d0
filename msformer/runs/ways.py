"""Ways to segment the images of a run: fitting a fresh MS-Former to each, or asking a trained network, or both.

A way takes the pixels of an image, and gives label map, mask and probabilities with what goes into the record. How it
was set up goes into the record as well, so that an image counts as done for the same way only.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from msformer.io.prepare import prepare_image, resize_image, resize_labels
from msformer.scoring import Mask
from msformer.segmentation import Progress, Segmentation, segment
from msformer.selection import AUTO, select

if TYPE_CHECKING:
    from msformer.io.read import Reading
    from msformer.runs.plan import Job
    from msformer.training.saved import TrainedModel

Record = dict[str, Any]

LOOKED_AT = 9
"""Images that are looked at before a trained network is asked for masks of them all."""


@dataclass(frozen=True, eq=False)
class Result:
    """What a way finds in an image; arrays ``[H, W]`` have its size."""

    labels: NDArray[np.integer]
    mask: Mask | None
    """None if no rule was given."""
    probability: NDArray[np.float32] | None
    """Of the object; None where the way knows none."""
    record: Record
    """How it came about: labels, seconds, device, backend, fitted_size, and what else there is to say."""


class Way(ABC):
    """A way to segment an image."""

    kinds: ClassVar[tuple[str, ...]]
    """Of the pictures that it gives beside a mask: labels, probability."""

    @property
    @abstractmethod
    def device(self) -> str:
        """That it runs on."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """That an image takes at most."""

    @abstractmethod
    def settings(self) -> Record:
        """What decides the result, as plain JSON."""

    def doubts(self, jobs: Sequence[Job], reading: Reading) -> list[str]:
        """Why it may not do well on these images, in a sentence each; looks at a few of them."""
        return []

    @abstractmethod
    def rule(self, asked: str | None) -> str | None:
        """The rule of masks, where the user asked for this one; `AUTO` leaves it to the kind of each image."""

    @abstractmethod
    def segment(self, pixels: NDArray[Any], rule: str | None, progress: Progress | None) -> Result:
        """Segments one image.

        Args:
            pixels: as `msformer.io.read.read_image` gives them.
            rule: of `msformer.selection`, by which the mask is made; None makes none.
            progress: called before each step of a fit.

        Raises:
            ValueError, FloatingPointError: as `msformer.segment`, for this image.
        """

    @abstractmethod
    def outcome(self, record: Record) -> str:
        """What a run says of an image."""

    @abstractmethod
    def caption(self, record: Record) -> str:
        """What a contact sheet says of an image."""


@dataclass(frozen=True)
class Fit(Way):
    """A fresh MS-Former is fitted to each image."""

    options: Record
    """Keyword arguments of `segment`."""
    kinds = ("labels",)

    @property
    def device(self) -> str:
        return str(self.options["device"])

    @property
    def steps(self) -> int:
        return int(self.options["max_steps"])

    def settings(self) -> Record:
        return self.options | {"weights": asdict(self.options["weights"])}

    def rule(self, asked: str | None) -> str | None:
        return asked

    def segment(self, pixels: NDArray[Any], rule: str | None, progress: Progress | None) -> Result:
        result = segment(pixels, progress=progress, **self.options)
        record = {
            "labels": result.num_labels,
            "steps": result.steps,
            "settled": result.settled,
            "seconds": round(result.seconds, 3),
            "device": result.device,
            "backend": result.backend,
            "fitted_size": list(result.labels.shape),
            "label_counts": result.label_counts,
            "losses": result.losses,
        }
        mask = None if rule is None else object_mask(pixels, result, rule)
        return Result(result.labels_full, mask, None, record)

    def outcome(self, record: Record) -> str:
        details = f"loss {record['losses'][-1]:.3f}, {record['seconds']:.1f} s"
        return f"{record['labels']} labels after {record['steps']} steps, {details}"

    def caption(self, record: Record) -> str:
        return f"{record['labels']} labels, {record['steps']} steps"


@dataclass(frozen=True)
class Model(Way):
    """A trained network is asked, and with `refine` a fit is made as well.

    The fit starts afresh, since starting from the network's weights gains nothing. Its label map is the one that is
    kept; its mask is one more vote beside those of the rules.

    Raises:
        ValueError: `refine` with a network of clusters, whose mask is a rule's already.
    """

    model: TrainedModel
    backend: str
    refine: Fit | None = None
    kinds = ("labels", "probability")

    def __post_init__(self) -> None:
        if self.refine is not None and self.model.objective != "teacher":
            raise ValueError(f"refine: the model knows clusters (objective {self.model.objective}), expected teacher")

    @property
    def device(self) -> str:
        return str(self.model.device)

    @property
    def steps(self) -> int:
        return 1 if self.refine is None else self.refine.steps

    def settings(self) -> Record:
        refine = None if self.refine is None else self.refine.settings()
        facts = {"model": self.model.digest, "domain": self.model.domain, "objective": self.model.objective}
        return facts | {"device": self.device, "backend": self.backend, "refine": refine}

    def doubts(self, jobs: Sequence[Job], reading: Reading) -> list[str]:
        from msformer.training.kinds import look_at, strangers

        strange = strangers(look_at(jobs, reading, LOOKED_AT), self.model.training.get("kinds", {}))
        return [*([] if strange is None else [strange]), *self.model.doubts]

    def rule(self, asked: str | None) -> str | None:
        from msformer.training.domains import find_domain

        return find_domain(self.model.domain).rule if asked == AUTO else asked

    def segment(self, pixels: NDArray[Any], rule: str | None, progress: Progress | None) -> Result:
        from msformer.training.predict import predict

        fitted = None if self.refine is None else self.refine.segment(pixels, rule, progress)
        votes = [] if fitted is None or fitted.mask is None else [fitted.mask]
        started = time.perf_counter()
        found = predict(
            self.model,
            prepare_image(pixels),
            gate="net" if rule is None else "fused",
            rule=rule,
            votes=votes,
            backend=self.backend,
        )
        seconds = time.perf_counter() - started
        labels, record = found.labels, {"labels": len(np.unique(found.labels)), "fitted_size": [self.model.size] * 2}
        if fitted is not None:
            labels, record = fitted.labels, fitted.record
            seconds += fitted.record["seconds"]
        record |= {"seconds": round(seconds, 3), "device": self.device, "backend": self.backend}
        record["confidence"] = round(found.confidence, 4)
        if rule is not None:
            record["decided_by"] = "refined" if votes else found.decided_by
        return Result(labels, None if rule is None else found.mask, found.probability, record)

    def outcome(self, record: Record) -> str:
        return f"{self.caption(record)}, {record['seconds']:.2f} s"

    def caption(self, record: Record) -> str:
        by = f", {record['decided_by']}" if "decided_by" in record else ""
        return f"confidence {record['confidence']:.2f}{by}"


def object_mask(pixels: NDArray[Any], result: Segmentation, rule: str) -> Mask:
    """The object ``[H, W]`` that a rule of `msformer.selection` finds in a label map, at the size of the image."""
    height, width = result.labels.shape
    found = select(rule, result.labels, resize_image(prepare_image(pixels), (height, width)))
    return np.asarray(resize_labels(found, result.labels_full.shape))
