"""MS-Former: by each preset, and for a table of ablations as published, with some of its losses only.

Karimijafarbigloo, Azad, Kazerouni, Merhof, "MS-Former: Multi-Scale Self-Guided Transformer for Medical Image
Segmentation", MIDL 2023, tables 1 and 2.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from msformer.baselines import LabelMap, Method, Task
from msformer.presets import PUBLISHED, QUICK, SMOOTH, LossWeights, Preset
from msformer.segmentation import fit_image


def label_map(task: Task, settings: Preset) -> LabelMap:
    """At the size that the settings say, or that of the image if they say none."""

    def report(step: int, labels: int, loss: float) -> None:
        task.report(step, settings.max_steps)

    found = fit_image(task.image, settings, task.seed, task.device, None, report)
    return LabelMap(found.labels_full, found.steps)


def _method(name: str, title: str, order: int, settings: Preset, tables: tuple[int, ...]) -> Method:
    return Method(name, title, order, partial(label_map, settings=settings), tables, str(settings))


def _ablation(name: str, title: str, order: int, inter: float = 0.0, intra: float = 0.0) -> Method:
    settings = replace(PUBLISHED, size=None, weights=LossWeights(FULL.ce, inter, intra))
    return _method(f"ms-former-{name}", f"MS-Former, {title}", order, settings, (2,))


FULL = PUBLISHED.weights
METHODS = [
    _ablation("ce", "ce", 8),
    _ablation("ce-inter", "ce + inter", 9, inter=FULL.inter),
    _ablation("ce-intra", "ce + intra", 10, intra=FULL.intra),
    _method("ms-former-published", "MS-Former, published", 11, replace(PUBLISHED, size=None), (2,)),
    _method("ms-former-quick", "MS-Former, quick", 12, QUICK, ()),
    _method("ms-former", "MS-Former", 13, replace(SMOOTH, size=None), (1,)),
]
