"""``msformer demo``: synthetic images with known masks, and the scores of their label maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from rich.table import Table

from msformer.messages import console
from msformer.output import prepare_folder
from msformer.pictures import read_labels, write_png
from msformer.runs.plan import Record
from msformer.scoring import Scores, score
from msformer.synthetic import synthetic_lesion


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


def score_all(finished: dict[str, Record], masks: dict[str, NDArray[np.bool_]], out: Path) -> dict[str, Scores]:
    """Scores by name, of the label maps as they were written."""
    return {name: score(read_labels(out / f"{name}.labels.png"), masks[name]) for name in finished}


def print_scores(scores: dict[str, Scores]) -> None:
    """A table of Dice coefficients in percent, with the mean."""
    if not scores:
        return
    table = Table(title="Dice coefficient (DSC), %")
    table.add_column("image")
    for column in ("best label", "union of labels", "floor: everything"):
        table.add_column(column, justify="right")
    for name, found in scores.items():
        table.add_row(name, *(f"{100 * value:.1f}" for value in found))
    table.add_section()
    table.add_row("mean", *(f"{100 * value:.1f}" for value in np.mean(list(scores.values()), axis=0)))
    shown = console()
    shown.print(table)
    note = "Both choices of labels look at the true mask: what the label map holds, not what one finds blindly."
    shown.print(note, style="dim", width=min(shown.width, 100))
