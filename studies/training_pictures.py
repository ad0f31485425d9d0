"""Ten images of a data set with what rules, network and both together find, good and bad ones, as a picture.

    python -m studies.training_pictures --data DIR --out DIR --to FILE.png [--model teacher-0]

DIR and OUT are those of `studies.training`, whose model and results are taken. Shown are the five images with the worst
fused masks, and five evenly spaced over the others, from bad to good.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image as PILImage

from msformer.evaluation.pairs import read_pair
from msformer.io.prepare import resize_image, resize_labels
from msformer.output import complete_file
from msformer.pictures import outline
from msformer.scoring import Mask, dice
from msformer.training.domains import find_domain
from msformer.training.predict import object_mask
from msformer.training.saved import TrainedModel
from msformer.training.settings import STEPS
from studies.training import FUSED, MAJORITY, NET, SIZE, DataSet, ask, data_set, masks, model_of, scores_of

SHOWN = {"majority of the rules": MAJORITY, "network alone": NET, "fused": FUSED}
WORST, SPACED = 5, 5
COLOURS = np.array([(255, 255, 255), (213, 94, 0), (0, 114, 178), (190, 190, 190)], np.uint8)
"""Of pixels that are outside and found so, wrongly found, missed, rightly found."""
SIDE = 1.15
"""Inches of a picture."""


class Shown(NamedTuple):
    """An image and the masks of it, all `SIZE` pixels wide and high."""

    image: NDArray[np.uint8]
    truth: Mask
    found: dict[str, Mask]


def chosen(scores: pd.DataFrame) -> list[str]:
    """Names of images, the worst first."""
    names = list(scores.image.iloc[FUSED.scores(scores).argsort()])
    rest = names[WORST:]
    places = np.linspace(0, len(rest) - 1, min(SPACED, len(rest))).round().astype(int) if rest else []
    return names[:WORST] + [rest[place] for place in places]


def look(data: DataSet, model: TrainedModel, name: str) -> Shown:
    """What is shown of an image."""
    case = next(case for case in data.cases if case.name == name)
    pair = read_pair(case)
    rules, network = ask(case, pair, model, data.out / "says")
    values, rule = masks(network["probability"], rules["masks"]), find_domain(model.domain).rule
    found = {title: object_mask(values[way.mask], rule, (SIZE, SIZE)) for title, way in SHOWN.items()}
    image = (resize_image(pair.image, (SIZE, SIZE)).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    return Shown(image, resize_labels(pair.truth, (SIZE, SIZE)), found)


def draw(rows: list[Shown]) -> Figure:
    """Two images a line: each with its true border in green, and the masks in `COLOURS`, with their DSC in percent."""
    lines, columns = -(-len(rows) // 2), 1 + len(SHOWN)
    figure = Figure(figsize=(2 * columns * SIDE, lines * (SIDE + 0.17) + 0.35), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, 2 * columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for place, row in enumerate(rows):
        own = axes[place % lines, place // lines * columns :][:columns]
        _picture(own[0], outline(row.image, row.truth), "image" if place % lines == 0 else "")
        for axis, (name, mask) in zip(own[1:], row.found.items(), strict=True):
            title = f"{100 * dice(mask, row.truth):.1f}"
            _picture(axis, COLOURS[mask + 2 * row.truth], title)
            if place % lines == 0:
                axis.set_title(f"{name}\n{title}", fontsize=7)
    return figure


def _picture(axis: Axes, pixels: NDArray[np.uint8], title: str) -> None:
    axis.imshow(pixels, interpolation="antialiased")
    axis.set_title(title, fontsize=7, pad=2)


@click.command()
@click.option("--data", "folder", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Of the study.")
@click.option("--to", required=True, type=click.Path(path_type=Path), help="The picture, a PNG of 256 colours.")
@click.option("--model", "name", default="teacher-0", show_default=True)
def main(folder: Path, out: Path, to: Path, name: str) -> None:
    """Draw ten images."""
    data = data_set(folder, out)
    model = model_of(data, name, STEPS)
    figure = draw([look(data, model, image) for image in chosen(scores_of(data, {name: model}))])
    with complete_file(to) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
        with PILImage.open(temporary) as picture:
            small = picture.convert("RGB").quantize(256, dither=PILImage.Dither.NONE)
        small.save(temporary, format="PNG", optimize=True)


if __name__ == "__main__":
    main()
