"""What training on a folder of images gains, and how the network is best fused with the rules that taught it.

    python -m studies.training --data DIR [--data DIR ...] --out DIR [--models teacher-0,teacher-0-r2,consistency-0]

A model is OBJECTIVE-SEED or OBJECTIVE-SEED-rROUNDS. It is trained on the images of a data set, without their masks,
unless OUT/<name of DIR>/models/<model> holds it. What networks and rules say of an image is kept in OUT and made once;
scores are those of `msformer evaluate`, at 257 x 257 pixels. OUT/study.md has the tables, OUT/<name of DIR>/scores.csv
the Dice coefficients of all images.

Masks choose one thing, the way to fuse: among those of `WAYS` the one with the best mean on four fifths of the images,
or on the other data sets. What is told is the score of the images that did not choose.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

import msformer
from benchmarks.documents import make_console
from benchmarks.tables import markdown_row
from msformer.baselines import choose_methods
from msformer.evaluation.command import RULE_OF_LAYOUT
from msformer.evaluation.layouts import Case, find_cases
from msformer.evaluation.models import model_methods
from msformer.evaluation.pairs import Pair, read_pair
from msformer.evaluation.run import evaluate
from msformer.evaluation.store import Settings, Store
from msformer.evaluation.summary import mean_and_interval, write_csv
from msformer.io.prepare import resize_image, resize_labels
from msformer.output import complete_file, prepare_folder
from msformer.runs.plan import fingerprint
from msformer.scoring import dice
from msformer.training import predict
from msformer.training.domains import Domain, find_domain
from msformer.training.predict import confidence, fused, object_mask, shares_of
from msformer.training.run import train
from msformer.training.saved import TrainedModel
from msformer.training.settings import STEPS
from msformer.training.teachers import TEACHER_SIZE, Teachers, rule_masks
from msformer_kernels.core.backends import resolve

SIZE = 257
"""Side of the square that images and masks are resized to, pixels."""
FOLDS = 5
POOR = 0.8
"""Masks with a Dice coefficient below are counted."""
RULES = ("otsu", "kmeans-2", "kmeans-3")
VOTES = (1.0, 2.0, 3.0, 6.0, 12.0)
"""As `msformer.training.predict.fused` takes them."""
TRUSTS = ("by its confidence", "in full")
"""How much the network's word counts in a fused mask."""
LIMITS = (0.65, 0.75, 0.85, 0.9)
NEVER = float("inf")
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Way:
    """A way to a mask: the network alone where its confidence is above a limit, else a mask that `masks` makes."""

    mask: str
    limit: float = NEVER

    @property
    def name(self) -> str:
        return self.mask if self.limit == NEVER else f"{self.mask}, net alone above {self.limit}"

    def scores(self, found: pd.DataFrame) -> pd.Series:
        """Of rows as `row` makes them."""
        return found[NET.mask].where(found["confidence"] > self.limit, found[self.mask])


def pooled(votes: float, trust: str) -> str:
    """The name of a mask."""
    return f"fused, {votes:g} votes, trusted {trust}"


NET, MEAN, MAJORITY = Way("net alone"), Way("mean"), Way("majority of the rules")
GATED = Way(MEAN.mask, 0.75)
FUSED = Way(pooled(predict.VOTES, TRUSTS[0]))
"""That of `msformer.training.predict`."""
WAYS = (
    NET,
    *(Way(MEAN.mask, limit) for limit in (NEVER, *LIMITS)),
    *(Way(pooled(votes, trust)) for trust in TRUSTS for votes in VOTES),
)
SHOWN = (NET, MEAN, GATED, FUSED)


@dataclass(frozen=True)
class DataSet:
    """Images with masks, and what is kept of them."""

    name: str
    layout: str
    cases: tuple[Case, ...]
    out: Path

    @property
    def rule(self) -> str:
        """Of the blind score of label maps."""
        return RULE_OF_LAYOUT[self.layout]


def data_set(folder: Path, out: Path) -> DataSet:
    """The images and masks below a folder; raises ValueError where there are none."""
    found, name = find_cases(folder, "auto", None), folder.resolve().name
    return DataSet(name, found.layout, found.cases, out / name)


def model_of(data: DataSet, name: str, steps: int) -> TrainedModel:
    """A model by its name, trained if there is none.

    Raises:
        ValueError: no name of a model, or what `train` raises.
    """
    folder = data.out / "models" / name
    if (folder / "model.json").exists():
        return msformer.load(folder, device="cpu")
    objective, _, rest = name.partition("-")
    seed, _, rounds = rest.partition("-r")
    if not seed.isdecimal() or not (rounds or "1").isdecimal():
        raise ValueError(f"models: expected OBJECTIVE-SEED or OBJECTIVE-SEED-rROUNDS, got {name!r}")
    return train(
        list(dict.fromkeys(case.image for case in data.cases)),
        folder,
        objective=objective,
        seed=int(seed),
        rounds=int(rounds or 1),
        steps=steps,
        window=data.cases[0].window,
        modality=data.cases[0].modality,
        all_slices=any(case.slice_index is not None for case in data.cases),
        device="cpu",
    )


def kept(path: Path, make: Callable[[], Arrays]) -> dict[str, NDArray[Any]]:
    """Arrays from a file, made and written if there is none."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = make()
        with complete_file(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


def what_rules_say(image: Tensor, domain: Domain) -> Arrays:
    """``masks`` ``[T, h, w]`` of the teachers of an image ``[3, H, W]``, and ``seconds``."""
    started = time.perf_counter()
    masks = rule_masks(resize_image(image, (TEACHER_SIZE, TEACHER_SIZE)), domain).masks
    return {"masks": masks, "seconds": np.array(time.perf_counter() - started)}


def what_the_network_says(image: Tensor, model: TrainedModel) -> Arrays:
    """``probability`` ``[h, w]`` of the object in an image ``[3, H, W]``, and ``seconds``."""
    started = time.perf_counter()
    probability = shares_of(model, image)[1]
    return {"probability": probability, "seconds": np.array(time.perf_counter() - started)}


def ask(case: Case, pair: Pair, model: TrainedModel, folder: Path) -> tuple[Arrays, Arrays]:
    """`what_rules_say` and `what_the_network_says` of an image, kept in a folder."""
    image, domain = resize_image(pair.image, (SIZE, SIZE)), find_domain(model.domain)
    about = (fingerprint(case.image), case.slice_index, case.window, msformer.__version__)
    key = f"{hashlib.sha256(repr(about).encode()).hexdigest()[:16]}.npz"
    return (
        kept(folder / f"rules-{domain.name}" / key, partial(what_rules_say, image, domain)),
        kept(folder / model.digest[:16] / key, partial(what_the_network_says, image, model)),
    )


def masks(probability: NDArray[np.float32], rules: NDArray[np.bool_]) -> dict[str, NDArray[np.float32]]:
    """By name, maps ``[h, w]`` that are above one half where the object is; of masks ``[T, h, w]`` of the rules."""
    share = rules.mean(0, dtype=np.float32)
    trusts = dict(zip(TRUSTS, (confidence(probability), 1.0), strict=True))
    return {
        NET.mask: probability,
        MAJORITY.mask: share,
        MEAN.mask: (probability + share) / 2,
        **{pooled(n, name): fused(probability, share, trust, n) for name, trust in trusts.items() for n in VOTES},
    }


def row(
    probability: NDArray[np.float32], rules: NDArray[np.bool_], pair: Pair, model: TrainedModel
) -> dict[str, float]:
    """Of one image the confidence of the network, the agreement of the rules, and the Dice coefficients of `masks`."""
    truth, rule = resize_labels(pair.truth, (SIZE, SIZE)), find_domain(model.domain).rule
    found = {name: object_mask(values, rule, (SIZE, SIZE)) for name, values in masks(probability, rules).items()}
    return {
        "confidence": confidence(probability),
        "agreement": Teachers(rules, ()).agreement,
        **{name: dice(mask, truth) for name, mask in found.items()},
    }


def scores_of(data: DataSet, models: Mapping[str, TrainedModel]) -> pd.DataFrame:
    """A row for each image and model with the objective ``teacher``."""
    rows = []
    for case in data.cases:
        pair = read_pair(case)
        for name, model in models.items():
            rules, network = ask(case, pair, model, data.out / "says")
            rows.append(
                {
                    "image": case.name,
                    "model": name,
                    "seconds": float(network["seconds"]),
                    "seconds of rules": float(rules["seconds"]),
                    **row(network["probability"], rules["masks"], pair, model),
                }
            )
    return pd.DataFrame(rows)


def scores_of_maps(data: DataSet, models: Mapping[str, TrainedModel]) -> tuple[pd.DataFrame, dict[str, str]]:
    """Rows of `msformer.evaluation.run.score` for the rules and for models of clusters, and titles by method."""
    rules = choose_methods(["everything", *RULES])
    clusters = {name: model_methods([f"{model.folder}/"], "cpu")[0] for name, model in models.items()}
    settings = Settings(SIZE, 0, "cpu", resolve(None, "cpu", torch.float32))
    outcome = evaluate(data.cases, (*rules, *clusters.values()), data.rule, Store(data.out, settings))
    for name, problem in outcome.failures.items():
        click.echo(f"failed: {name}: {problem}", err=True)
    titles = {method.name: method.title for method in rules} | {way.name: name for name, way in clusters.items()}
    return pd.DataFrame(outcome.rows), titles


def cells(values: pd.Series, seconds: float) -> list[str]:
    """Mean with interval, poor ones, seconds."""
    mean, low, high = mean_and_interval(values.to_numpy(float))
    interval = "" if np.isnan(low) else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return [f"{100 * mean:.1f}{interval}", str(int((values < POOR).sum())), f"{seconds:.2f}"]


def table_of_methods(maps: pd.DataFrame, titles: Mapping[str, str], scores: pd.DataFrame) -> list[list[str]]:
    """Rules, clusters, teachers, and each network alone and fused, a line each."""
    lines = [["", "blind", "< 80", "s an image", "oracle", "oracle-union"]]
    for method, title in titles.items():
        own = maps[maps.method == method]
        means = [f"{100 * own[own.protocol == name].dsc.mean():.1f}" for name in ("oracle", "oracle-union")]
        blind = own[own.protocol == "blind"]
        lines.append([title, *cells(blind.dsc, blind.seconds.mean()), *means])
    for place, (model, own) in enumerate(scores.groupby("model", sort=False)):
        net, rules = own["seconds"].mean(), own["seconds of rules"].mean()
        if place == 0:
            lines.append([MAJORITY.name, *cells(MAJORITY.scores(own), rules), "", ""])
        for way in SHOWN:
            asked = 0 if way == NET else (own["confidence"] <= way.limit).mean()
            lines.append([f"{model}, {way.name}", *cells(way.scores(own), net + asked * rules), "", ""])
    return lines


def table_of_ways(scores: Mapping[str, pd.DataFrame]) -> list[list[str]]:
    """The mean of each way over images and models, a column a data set."""
    lines = [["", *scores]]
    for way in WAYS:
        lines.append([way.name, *(f"{100 * way.scores(found).mean():.2f}" for found in scores.values())])
    return lines


def fold_of(images: Sequence[str]) -> dict[str, int]:
    """A fold for each image, whose numbers differ by at most one image."""
    names = sorted(set(images))
    order = np.random.default_rng(0).permutation(len(names))
    return {names[place]: int(number % FOLDS) for number, place in enumerate(order)}


def by_image(way: Way, found: pd.DataFrame) -> pd.Series:
    """The scores of a way, each the mean over the models."""
    return way.scores(found).groupby(found.image).mean()


def best_way(scores: Sequence[pd.DataFrame]) -> Way:
    """That with the best mean of the means of data sets; the first of equals."""
    means = [np.mean([way.scores(found).mean() for found in scores]) for way in WAYS]
    return WAYS[int(np.argmax(means))]


def table_of_choices(scores: Mapping[str, pd.DataFrame]) -> list[list[str]]:
    """Scores of images that did not choose the way: chosen on four fifths of all sets, and on the other sets."""
    folds = {name: found.image.map(fold_of(list(found.image))) for name, found in scores.items()}
    chosen = [best_way([found[folds[name] != fold] for name, found in scores.items()]) for fold in range(FOLDS)]
    lines = [["", "by folds of all sets", "chosen", "by the other sets", "chosen"]]
    for name, found in scores.items():
        told = [found[folds[name] == fold] for fold in range(FOLDS)]
        parts = [by_image(way, some) for way, some in zip(chosen, told, strict=True)]
        others = [other for key, other in scores.items() if key != name]
        line = [name, cells(pd.concat(parts), 0)[0], "; ".join(dict.fromkeys(way.name for way in chosen))]
        if others:
            way = best_way(others)
            line += [cells(by_image(way, found), 0)[0], way.name]
        lines.append(line + [""] * (len(lines[0]) - len(line)))
    return lines


def study(data: DataSet, names: Sequence[str], steps: int) -> tuple[list[list[str]], pd.DataFrame]:
    """The table of methods of a data set, and its scores, which are written."""
    prepare_folder(data.out)
    models = {name: model_of(data, name, steps) for name in names}
    taught = {name: model for name, model in models.items() if model.objective == "teacher"}
    if not taught:
        raise ValueError(f"models: expected one of the objective teacher at least, got {', '.join(names)}")
    maps, titles = scores_of_maps(data, {name: model for name, model in models.items() if name not in taught})
    scores = scores_of(data, taught)
    write_csv(scores, data.out / "scores.csv")
    write_csv(maps, data.out / "maps.csv")
    return table_of_methods(maps, titles, scores), scores


def as_markdown(table: Sequence[Sequence[str]]) -> str:
    return "\n".join(map(markdown_row, [table[0], ["---"] * len(table[0]), *table[1:]]))


@click.command()
@click.option("--data", "folders", required=True, multiple=True, type=click.Path(path_type=Path, exists=True))
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.option("--models", default="teacher-0", show_default=True, help="Names, joined by commas.")
@click.option("--steps", default=STEPS, show_default=True, type=click.IntRange(1), help="Of each round.")
def main(folders: tuple[Path, ...], out: Path, models: str, steps: int) -> None:
    """Train what is missing, score all of it, choose the way to fuse by folds."""
    parts, scores = [], {}
    for folder in folders:
        data = data_set(folder, out)
        try:
            table, scores[data.name] = study(data, models.split(","), steps)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        parts.append(f"## {data.name}: {len(data.cases)} images\n\n{as_markdown(table)}\n")
    parts.append(f"## Ways to fuse\n\n{as_markdown(table_of_ways(scores))}\n")
    parts.append(f"## Chosen by folds\n\n{as_markdown(table_of_choices(scores))}\n")
    text = "\n".join(parts)
    with complete_file(out / "study.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    make_console().print(text, markup=False)


if __name__ == "__main__":
    main()
