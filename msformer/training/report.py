"""The page that shows how a training goes, written anew every so often: losses, agreement, and some images with what
the teachers and the network see in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from numpy.typing import NDArray

from msformer.drawing import svg
from msformer.model import MSFormer
from msformer.output import complete_file
from msformer.page import rendered
from msformer.pictures import OKABE_ITO, outline, overlay, picture_url
from msformer.training.following import some_of
from msformer.training.lessons import Pool
from msformer.training.settings import PREDICTION_SIZE
from msformer.training.sight import Sight
from msformer.training.trainer import AGREEMENT
from msformer.training.views import shares

REPORT = "report.html"
SHOWN = 12
"""Images in the grid at most, spread over the folder."""
POINTS = 200
"""Of a curve at most, each the mean of as many steps as it takes."""
TEACHER_COLOUR, NETWORK_COLOUR = (0, 255, 120), (255, 90, 200)


@dataclass(frozen=True)
class Facts:
    """What stands above the curves."""

    about: Mapping[str, str]
    warnings: Sequence[str]
    done: bool
    """Whether the training is over."""


@dataclass(frozen=True)
class Picture:
    """An image of the grid."""

    name: str
    image: str
    found: str
    caption: str


def write_report(folder: Path, facts: Facts, history: Mapping[str, Sequence[float]], grid: Sequence[Picture]) -> None:
    """Writes the page; the old one stays until the new one is whole.

    Raises:
        OutputError: it cannot be written.
    """
    parts = rendered(
        "msformer.training", "report.html", facts=facts, curves=curves(history) if history else "", grid=grid
    )
    with complete_file(folder / REPORT) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(parts)


def pictures(network: MSFormer, pool: Pool, sight: Sight) -> list[Picture]:
    """Some images of the pool: with the borders that teachers and network draw, or with the clusters of the network."""
    return [_picture(network, pool, sight, place) for place in some_of(pool, SHOWN)]


def _picture(network: MSFormer, pool: Pool, sight: Sight, place: int) -> Picture:
    pixels = np.ascontiguousarray(pool.images[place].permute(1, 2, 0).numpy())
    found = shares(network, pool.images[place], sight, PREDICTION_SIZE).numpy()
    if len(found) != 2:
        labels = found.argmax(0)
        shown = overlay(pixels, labels)
        return Picture(pool.names[place], picture_url(pixels), picture_url(shown), f"{len(np.unique(labels))} labels")
    seen, target = found[1] > 0.5, pool.target[place].numpy() > 0
    taught = outline(pixels, target, TEACHER_COLOUR)
    both = 200 * (seen & target).sum() / max(int(seen.sum() + target.sum()), 1)
    shown = outline(outline(pixels, target, TEACHER_COLOUR), seen, NETWORK_COLOUR)
    return Picture(pool.names[place], picture_url(taught), picture_url(shown), f"agreement {both:.0f} %")


def curves(history: Mapping[str, Sequence[float]]) -> Markup:
    """SVG: each loss over the steps, and the agreement."""
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    FigureCanvasSVG(figure)
    losses = [name for name in history if name != AGREEMENT]
    agreed = np.asarray(history.get(AGREEMENT, []))
    axes = figure.subplots(1, 2 if agreed.any() else 1, squeeze=False)[0]
    for name, colour in zip(losses, OKABE_ITO, strict=False):
        axes[0].plot(*smoothed(history[name]), color=colour, label=name)
    axes[0].legend(frameon=False)
    axes[0].set_ylabel("loss")
    if agreed.any():
        steps, values = smoothed(agreed)
        axes[1].plot(steps, 100 * values, color=OKABE_ITO[5])
        axes[1].set_ylabel("agreement with the teachers, %")
    for each in axes:
        each.set_xlabel("step")
        each.grid(alpha=0.3)
    shown = ", ".join(losses) + (" and the agreement with the teachers" if agreed.any() else "")
    return svg(figure, f"Curves over the steps: {shown}")


def smoothed(values: Sequence[float] | NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps, counted from 1, and means of neighbouring values: at most `POINTS` of each."""
    parts = np.array_split(np.asarray(values, dtype=np.float64), min(POINTS, len(values)))
    ends = np.cumsum([len(part) for part in parts])
    return ends - np.array([(len(part) - 1) / 2 for part in parts]), np.array([part.mean() for part in parts])
