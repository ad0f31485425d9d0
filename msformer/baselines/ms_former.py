"""MS-Former, and for a table of ablations with some of its losses only.

Karimijafarbigloo, Azad, Kazerouni, Merhof, "MS-Former: Multi-Scale Self-Guided Transformer for Medical Image
Segmentation", MIDL 2023, tables 1 and 2.
"""

from __future__ import annotations

from functools import partial

from msformer.baselines import LabelMap, Method, Task
from msformer.losses import LossWeights
from msformer.segmentation import segment

PUBLISHED = LossWeights()


def label_map(task: Task, weights: LossWeights = PUBLISHED) -> LabelMap:
    """With the published settings, at the size of the image."""
    max_steps = 50
    found = segment(
        task.image,
        size=None,
        max_steps=max_steps,
        seed=task.seed,
        weights=weights,
        device=task.device,
        progress=lambda step, labels, loss: task.report(step, max_steps),
    )
    return LabelMap(found.labels, found.steps)


def _ablation(name: str, title: str, order: int, **weights: float) -> Method:
    some = LossWeights(PUBLISHED.ce, **({"inter": 0.0, "intra": 0.0} | weights))
    return Method(f"ms-former-{name}", f"MS-Former, {title}", order, partial(label_map, weights=some), ablation=True)


METHODS = [
    Method("ms-former", "MS-Former", 10, label_map),
    _ablation("ce", "ce", 11),
    _ablation("ce-inter", "ce + inter", 12, inter=PUBLISHED.inter),
    _ablation("ce-intra", "ce + intra", 13, intra=PUBLISHED.intra),
    Method("ms-former-all", "MS-Former, all losses", 14, label_map, ablation=True),
]
