"""``msformer demo``: synthetic images with known masks, and the scores of what is found in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from rich.table import Table

from msformer.messages import console
from msformer.output import prepare_folder
from msformer.pictures import read_labels, write_png
from msformer.scoring import Mask, dice, score
from msformer.synthetic import synthetic_lesion

MEANING = (
    "A score of 100 is the true lesion pixel by pixel, 0 none of it: blind is the mask that you get, whose rule never "
    "sees the truth; oracle is the one label that fits the truth best, which nobody finds without it; floor is what "
    "calling the whole image a lesion is worth."
)


class DemoScores(NamedTuple):
    """Dice coefficients in [0, 1]."""

    blind: float
    """Of the mask, which a rule chose that does not see the true one."""
    oracle: float
    """Of the one label with the best score."""
    everything: float
    """The floor: of the whole image."""


def make_images(
    out: Path, count: int, seed: int, varied: bool = False
) -> tuple[list[Path], dict[str, NDArray[np.bool_]]]:
    """Writes images and masks, of `synthetic_lesion`; returns the paths of the images, and the masks by name."""
    sources, masks = [], {}
    for folder in (out / "images", out / "masks"):
        prepare_folder(folder)
    for number in range(count):
        lesion = synthetic_lesion(seed * 1000 + number, varied=varied)
        name = f"lesion-{seed}-{number + 1:02d}"
        for kind, pixels in (("images", lesion.image), ("masks", lesion.mask)):
            write_png(PILImage.fromarray(pixels), out / kind / f"{name}.png")
        sources.append(out / "images" / f"{name}.png")
        masks[name] = lesion.mask
    return sources, masks


def score_all(finished: Iterable[str], masks: Mapping[str, Mask], out: Path) -> dict[str, DemoScores]:
    """Scores by name, of the masks and label maps as they were written."""
    found = {}
    for name in finished:
        blind = dice(read_labels(out / f"{name}.mask.png") > 0, masks[name])
        of_labels = score(read_labels(out / f"{name}.labels.png"), masks[name])
        found[name] = DemoScores(blind, of_labels.oracle, of_labels.everything)
    return found


def print_scores(scores: Mapping[str, DemoScores]) -> None:
    """A table of Dice coefficients in percent, with the mean, and what they mean."""
    if not scores:
        return
    table = Table(title="Dice coefficient (DSC), %")
    table.add_column("image")
    for column in ("blind: the mask", "oracle: best label", "floor: everything"):
        table.add_column(column, justify="right")
    for name, found in scores.items():
        table.add_row(name, *(f"{100 * value:.1f}" for value in found))
    table.add_section()
    table.add_row("mean", *(f"{100 * value:.1f}" for value in np.mean(list(scores.values()), axis=0)))
    shown = console()
    shown.print(table)
    shown.print(MEANING, width=min(shown.width, 100))
