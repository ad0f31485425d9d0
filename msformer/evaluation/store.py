"""Label maps of methods on images, kept in a folder so that none is made twice.

``maps/<method>/<image>.png`` is the label map at the fitted size, ``maps/<method>/<image>.json`` the record of how it
was made, written last: a map with a record is complete. ``maps/<method>-masks/<image>.png`` is the mask of the object,
from methods that know it. A map counts as done for the same image (by content), settings of
the evaluation and of the method, and version.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import msformer
from msformer.baselines import Method, Task
from msformer.evaluation.layouts import Case
from msformer.evaluation.pairs import Pair
from msformer.io.prepare import resize_image
from msformer.memory import kept_memory
from msformer.output import check_name, read_record, remove, write_json
from msformer.pictures import indexed_png, read_labels, write_png
from msformer.runs.executors import Report
from msformer.runs.plan import fingerprint
from msformer.scoring import Mask
from msformer.segmentation import order_by_area
from msformer.selection import select
from msformer_kernels import use_backend


@dataclass(frozen=True)
class Settings:
    """What every method of an evaluation is given."""

    size: int
    """Side of the fitted image, pixels."""
    seed: int
    device: str
    backend: str


@dataclass(frozen=True)
class Fitted:
    """A label map ``[size, size]``, labels by falling area, and how it came about."""

    labels: NDArray[np.integer[Any]]
    steps: int
    seconds: float
    mask: Mask | None = None
    """Of the object, from methods that know it."""

    def blind(self, rule: str, image: Tensor) -> Mask:
        """The mask of the object ``[size, size]``: the method's own, or else by a rule, that sees ``[3, H, W]``."""
        if self.mask is not None:
            return self.mask
        return select(rule, self.labels, resize_image(image, (self.labels.shape[0], self.labels.shape[1])))


class Store:
    """The label maps in a folder."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.root, self.folder = folder, folder / "maps"
        self.settings = settings

    def load(self, method: Method, case: Case) -> Fitted | None:
        """What was made before; None if it was not, from another image, with other settings, or if it is damaged."""
        record = self.record(method, case)
        if record is None:
            return None
        try:
            labels = read_labels(self._file(method, case, ".png"))
            mask = read_labels(self._mask_file(method, case)) > 0 if record.get("mask") else None
            return Fitted(labels, record["steps"], record["seconds"], mask)
        except Exception:  # decoders raise whatever they like on damaged files
            return None

    def has(self, method: Method, case: Case) -> bool:
        """Whether `load` finds something; an image that cannot be read has nothing."""
        try:
            return self.record(method, case) is not None
        except OSError:
            return False

    def check_names(self, method: Method, case: Case) -> None:
        """Raises NameRefused where the files of an image cannot have their names."""
        for suffix in (".png", ".json"):
            check_name(self._file(method, case, suffix))

    def record(self, method: Method, case: Case) -> dict[str, Any] | None:
        """How a label map was made; None where `load` finds none."""
        found = read_record(self._file(method, case, ".json"))
        if found is None or not self._file(method, case, ".png").exists():
            return None
        if found.get("mask") and not self._mask_file(method, case).exists():
            return None
        key = self._key(method, case)
        return found if {name: found.get(name) for name in key} == key else None

    def fit(self, method: Method, case: Case, pair: Pair, report: Report) -> Fitted:
        """Makes the label map and keeps it; raises what the method raises."""
        size = self.settings.size
        image = resize_image(pair.image, (size, size))
        task = Task(image, pair.colour, self.settings.seed, torch.device(self.settings.device), report)
        started = time.perf_counter()
        with kept_memory(), use_backend(self.settings.backend):
            made = method.label_map(task)
        seconds = round(time.perf_counter() - started, 3)
        fitted = Fitted(order_by_area(made.labels), made.steps, seconds, made.mask)
        record = self._file(method, case, ".json")
        remove(record)  # an older one is not that of the new map
        write_png(indexed_png(fitted.labels), self._file(method, case, ".png"), optimize=True)
        facts = {"steps": fitted.steps, "seconds": fitted.seconds, "read": dict(pair.read)}
        if fitted.mask is not None:
            write_png(indexed_png(fitted.mask), self._mask_file(method, case), optimize=True)
            facts["mask"] = True
        write_json(record, self._key(method, case) | facts)
        return fitted

    def _file(self, method: Method, case: Case, suffix: str) -> Path:
        return self.folder / method.name / f"{case.name}{suffix}"

    def _mask_file(self, method: Method, case: Case) -> Path:
        return self.folder / f"{method.name}-masks" / f"{case.name}.png"

    def _key(self, method: Method, case: Case) -> dict[str, Any]:
        reading: dict[str, Any] = {"window": None if case.window is None else list(case.window)}
        if case.slice_index is not None:
            reading["slice"] = case.slice_index
        if case.modality is not None:
            reading["modality"] = case.modality
        return {
            "settings": asdict(self.settings) | reading,
            "method": method.settings,
            "version": msformer.__version__,
            "sha256": fingerprint(case.image),
        }
