"""MS-Former, and for a table of ablations with some of its losses only.

Karimijafarbigloo, Azad, Kazerouni, Merhof, "MS-Former: Multi-Scale Self-Guided Transformer for Medical Image
Segmentation", MIDL 2023, tables 1 and 2.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from msformer.baselines import LabelMap, Method, Task
from msformer.presets import PUBLISHED, LossWeights
from msformer.segmentation import fit_image


def label_map(task: Task, weights: LossWeights = PUBLISHED.weights) -> LabelMap:
    """With the published settings, at the size of the image."""

    def report(step: int, labels: int, loss: float) -> None:
        task.report(step, PUBLISHED.max_steps)

    settings = replace(PUBLISHED, size=None, weights=weights)
    found = fit_image(task.image, settings, task.seed, task.device, None, report)
    return LabelMap(found.labels, found.steps)


def _ablation(name: str, title: str, order: int, **weights: float) -> Method:
    some = LossWeights(PUBLISHED.weights.ce, **({"inter": 0.0, "intra": 0.0} | weights))
    return Method(f"ms-former-{name}", f"MS-Former, {title}", order, partial(label_map, weights=some), tables=(2,))


METHODS = [
    _ablation("ce", "ce", 8),
    _ablation("ce-inter", "ce + inter", 9, inter=PUBLISHED.weights.inter),
    _ablation("ce-intra", "ce + intra", 10, intra=PUBLISHED.weights.intra),
    Method("ms-former", "MS-Former", 11, label_map, tables=(1, 2)),
]
