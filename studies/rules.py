"""What a rule for masks is worth where something dark besides the lesion is in the picture.

    python -m studies.rules --data DIR --out DIR [--beside OTHER/scores.csv]

Blind Dice coefficients of rule `lesion` on the label maps of Otsu and k-means, at 257 x 257 pixels, on the images of a
data set as they are, with dark corners, with hairs, and with both, drawn as `msformer train` draws them. OUT/scores.csv
has those of all images. With --beside also the differences to an earlier scores.csv, such as of another commit, image
by image. Brackets are 95% bootstrap intervals.
"""

from __future__ import annotations

from pathlib import Path

import click
import pandas as pd
import torch
from torch import Tensor

from benchmarks.tables import markdown_row
from msformer.baselines import Task, choose_methods
from msformer.evaluation.layouts import find_cases
from msformer.evaluation.pairs import read_pair
from msformer.evaluation.summary import mean_and_interval, write_csv
from msformer.io.prepare import resize_image, resize_labels
from msformer.output import prepare_folder
from msformer.scoring import dice
from msformer.selection import select
from msformer.training.augment import Strengths, draw_appearance, draw_corners, draw_hairs, generator

SIZE = 257
METHODS = ("otsu", "kmeans-2", "kmeans-3")
DRAWN = {
    "as they are": Strengths(),
    "with drawn corners": Strengths(corners=1.0),
    "with drawn hairs": Strengths(hairs=1.0),
    "with both": Strengths(corners=1.0, hairs=1.0),
}
KEY = ["images", "method", "image"]


def drawn(image: Tensor, number: int, strengths: Strengths) -> Tensor:
    """The image ``[3, SIZE, SIZE]``, the `number`-th of its data set, with what the strengths say."""
    look = draw_appearance([generator(0, number)], SIZE, strengths)
    nothing = torch.zeros(1, SIZE, SIZE)
    return draw_corners(draw_hairs(image[None], look), nothing, nothing, look)[0][0].contiguous()


def scores_of(data: Path) -> pd.DataFrame:
    """A row for each drawing, method and image, with its Dice coefficient in percent."""
    rows = []
    for number, case in enumerate(find_cases(data).cases):
        pair = read_pair(case)
        image, truth = resize_image(pair.image, (SIZE, SIZE)), resize_labels(pair.truth, (SIZE, SIZE))
        for name, strengths in DRAWN.items():
            seen = drawn(image, number, strengths)
            for method in choose_methods(METHODS):
                labels = method.label_map(Task(seen, pair.colour, 0, torch.device("cpu"))).labels
                found = 100 * dice(select("lesion", labels, seen), truth)
                rows.append((name, method.name, case.name, found))
    return pd.DataFrame(rows, columns=[*KEY, "dsc"])


def table(scores: pd.DataFrame, sign: str = "") -> str:
    """Means over images in Markdown: a row for each drawing, a column for each method."""
    lines = [markdown_row(["images", *METHODS]), "|" + "---|" * (1 + len(METHODS))]
    for name in DRAWN:
        cells = [name]
        for method in METHODS:
            some = scores[(scores.images == name) & (scores.method == method)].dsc.to_numpy()
            mean, low, high = mean_and_interval(some)
            cells.append(f"{mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]")
        lines.append(markdown_row(cells))
    return "\n".join(lines)


def differences(scores: pd.DataFrame, earlier: pd.DataFrame) -> pd.DataFrame:
    """Image by image.

    Raises:
        click.UsageError: scores of other images.
    """
    both = scores.merge(earlier, on=KEY, suffixes=("", "_earlier"))
    if len(both) != len(scores) or len(earlier) != len(scores):
        raise click.UsageError(f"--beside: expected scores of the same {len(scores)} maps, found {len(both)} of them")
    return both.assign(dsc=both.dsc - both.dsc_earlier)


@click.command()
@click.option("--data", required=True, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.option("--beside", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="An earlier scores.csv.")
def main(data: Path, out: Path, beside: Path | None) -> None:
    """Scores of the rule `lesion` on images with drawn corners and hairs."""
    prepare_folder(out)
    scores = scores_of(data)
    write_csv(scores, out / "scores.csv")
    click.echo(table(scores))
    if beside:
        found = differences(scores, pd.read_csv(beside))
        click.echo(f"\nless {beside}:\n{table(found, sign='+')}")
        changed = found[found.images != "as they are"].dsc
        click.echo(
            f"of {len(changed)} maps with something drawn {(changed > 1).sum()} gain more than 1 point, "
            f"{(changed < -1).sum()} lose more; from {changed.min():+.0f} to {changed.max():+.0f}"
        )


if __name__ == "__main__":
    main()
