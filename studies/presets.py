"""What decides MS-Former's result: variants of the published setting, each against it on the same images.

    python -m studies.presets --data DIR --out DIR [--only size-129,margin+lab] [--every 4] [--at 129]

A variant changes one thing. Label maps are kept in OUT and made once; scores are those of `msformer evaluate`. Printed
are the mean DSC of three protocols and, with a 95% bootstrap interval over images, by how much it differs from the
base's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from skimage.color import rgb2lab
from skimage.filters import gaussian, median
from torch import Tensor

import msformer_kernels
from benchmarks.documents import make_console
from msformer.baselines import LabelMap, Method, Task
from msformer.baselines.iic import jitter
from msformer.evaluation.command import RULE_OF_LAYOUT
from msformer.evaluation.layouts import find_cases
from msformer.evaluation.run import evaluate
from msformer.evaluation.store import Settings, Store
from msformer.evaluation.summary import mean_and_interval
from msformer.io.prepare import resize_image, resize_labels
from msformer.losses import total_loss
from msformer.model import MSFormer
from msformer.output import complete_file, prepare_folder
from msformer.presets import LossWeights
from msformer.segmentation import seeded
from msformer_kernels.core.backends import resolve

SHOWN = ("blind", "oracle", "oracle-union")


@dataclass(frozen=True)
class Variant:
    """A way to fit MS-Former; the defaults are the published one."""

    size: int = 257
    seed: int = 0
    max_steps: int = 50
    min_labels: int = 3
    weights: LossWeights = field(default_factory=LossWeights)
    embed_dim: int = 100
    num_clusters: int | None = None
    depth: int = 2
    learning_rate: float = 0.1
    momentum: float = 0.9
    prepare: tuple[Callable[[Tensor], Tensor], ...] = ()
    """Of ``[3, h, w]`` in [0, 1], once, one after the other."""
    view: Callable[[Tensor, int, torch.Generator], Tensor] = lambda image, step, random: image
    """Of ``[1, 3, h, w]``, before every step."""
    margin: int = 0
    """Pixels mirrored around the image, and taken off the label map."""
    backend: str | None = None
    """Of the kernels; None: the fastest."""
    icnr: bool = False
    """As `MSFormer.initialise_icnr` says."""
    running_statistics: bool = False
    """BatchNorm in evaluation mode for the final map."""

    def label_map(self, task: Task) -> LabelMap:
        """As `msformer.segment` does it, with the things that it does not offer."""
        with msformer_kernels.use_backend(self.backend or resolve(None, task.device.type, torch.float32)):
            return self._label_map(task)

    def _label_map(self, task: Task) -> LabelMap:
        seed = task.seed + self.seed
        random = torch.Generator().manual_seed(seed)
        image = resize_image(task.image, (self.size, self.size))
        for change in self.prepare:
            image = change(image)
        image = F.pad(image[None], (self.margin,) * 4, mode="reflect").to(task.device)
        with seeded(seed, task.device):
            model = MSFormer(3, self.embed_dim, self.num_clusters, self.depth)
        if self.icnr:
            model.initialise_icnr()
        model.to(task.device).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=self.learning_rate, momentum=self.momentum, fused=True)
        steps = 0
        for steps in range(1, self.max_steps + 1):
            output = model(self.view(image, steps, random), attention=self.weights.intra != 0)
            labels = output.logits.argmax(1)
            optimizer.zero_grad()
            total_loss(output, labels, self.weights).backward()
            optimizer.step()
            task.report(steps, self.max_steps)
            if len(labels.unique()) <= self.min_labels:
                break
        model.train(not self.running_statistics)
        with torch.no_grad():
            found = model(image, attention=False).logits.argmax(1)[0].cpu().numpy()
        found = found[self.margin : self.margin + self.size, self.margin : self.margin + self.size]
        return LabelMap(resize_labels(found, (task.image.shape[1], task.image.shape[2])), steps)


def lab(image: Tensor) -> Tensor:
    """CIELAB, each channel from 0 to 1."""
    channels = torch.from_numpy(rgb2lab(image.permute(1, 2, 0).numpy())).permute(2, 0, 1).float()
    return (channels + torch.tensor([0.0, 128, 128])[:, None, None]) / torch.tensor([100.0, 256, 256])[:, None, None]


def whitened(image: Tensor) -> Tensor:
    """Channels without correlation, mean 0 and variance 1; grey images get mean 0 and variance 1."""
    pixels = image.flatten(1).double()
    pixels = pixels - pixels.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh(pixels @ pixels.T / pixels.shape[1])
    scale = values.clamp(min=1e-4 * float(values.max())).rsqrt()
    return (vectors @ (scale[:, None] * (vectors.T @ pixels))).float().view(image.shape)


def standardised(image: Tensor) -> Tensor:
    """Each channel with mean 0 and variance 1."""
    return (image - image.mean((1, 2), keepdim=True)) / image.std((1, 2), keepdim=True).clamp(min=1e-6)


def stretched(image: Tensor) -> Tensor:
    """From the smallest and largest value of all channels to 0 and 1."""
    return (image - image.min()) / (image.max() - image.min()).clamp(min=1e-6)


def blurred(image: Tensor, sigma: float) -> Tensor:
    """By a Gaussian of this standard deviation in pixels."""
    return torch.from_numpy(gaussian(image.numpy(), sigma, channel_axis=0)).float()


def without_hairs(image: Tensor, side: int = 7) -> Tensor:
    """The median in a square of this side, each channel."""
    square = np.ones((side, side), bool)
    return torch.from_numpy(np.stack([median(channel, square) for channel in image.numpy()]))


def flipped(image: Tensor, step: int, random: torch.Generator) -> Tensor:
    """One of the four mirror images."""
    axes = [axis for axis, flip in zip((2, 3), torch.rand(2, generator=random) < 0.5, strict=True) if flip]
    return image.flip(axes)


def noisy(image: Tensor, step: int, random: torch.Generator) -> Tensor:
    """With Gaussian noise of standard deviation 0.05."""
    return image + 0.05 * torch.randn(image.shape, generator=random)


CHANGES: dict[str, dict[str, Any]] = {
    "published": {},
    **{f"seed-{seed}": {"seed": seed} for seed in (1, 2, 3, 4)},
    **{f"size-{size}": {"size": size} for size in (97, 129, 193, 385)},
    **{f"steps-{steps}": {"max_steps": steps} for steps in (10, 25, 100)},
    **{f"labels-{labels}": {"min_labels": labels} for labels in (2, 5, 8)},
    "ce": {"weights": LossWeights(1, 0, 0)},
    "ce-inter": {"weights": LossWeights(1, 1.5, 0)},
    "ce-intra": {"weights": LossWeights(1, 0, 1.3)},
    "first-cell": {"weights": LossWeights(1, 2, 1.2)},
    **{f"width-{width}": {"embed_dim": width} for width in (32, 64)},
    **{f"clusters-{clusters}": {"num_clusters": clusters} for clusters in (8, 16, 32)},
    "depth-1": {"depth": 1},
    **{f"rate-{rate}": {"learning_rate": rate} for rate in (0.03, 0.2)},
    "reference": {"backend": "reference"},
    "running-statistics": {"running_statistics": True},
    **{f.__name__: {"prepare": (f,)} for f in (lab, whitened, standardised, stretched, without_hairs)},
    **{f"blur-{sigma}": {"prepare": (partial(blurred, sigma=sigma),)} for sigma in (1, 2)},
    "flip": {"view": flipped},
    "jitter": {"view": lambda image, step, random: jitter(image, random)},
    "noise": {"view": noisy},
    "margin": {"margin": 8},
    "icnr": {"icnr": True},
}


def variant(name: str, size: int) -> Variant:
    """Of a key of `CHANGES`, or several joined by ``+``, at a fitted size unless it has its own.

    Raises:
        ValueError: an unknown key.
    """
    settings: dict[str, Any] = {"size": size}
    for key in name.split("+"):
        if key not in CHANGES:
            raise ValueError(f"unknown variant {key!r}; expected some of {', '.join(CHANGES)}, joined by +")
        changes = CHANGES[key]
        settings |= changes | {"prepare": settings.get("prepare", ()) + changes.get("prepare", ())}
    return Variant(**settings)


def compare(scores: pd.DataFrame, base: str, names: Sequence[str]) -> list[list[str]]:
    """A line a variant: name, for each protocol mean DSC and difference to the base with interval, labels, seconds."""
    lines = []
    for name in names:
        line = [name]
        for protocol in SHOWN:
            of = {
                method: some.set_index("image").dsc
                for method, some in scores[scores.protocol == protocol].groupby("method")
            }
            mean, low, high = mean_and_interval((of[name] - of[base]).dropna().to_numpy())
            interval = "" if np.isnan(low) else f" [{100 * low:+.1f}, {100 * high:+.1f}]"
            line += [f"{100 * of[name].mean():.1f}", f"{100 * mean:+.1f}{interval}"]
        own = scores[(scores.method == name) & (scores.protocol == SHOWN[0])]
        lines.append([*line, f"{own.labels.mean():.1f}", f"{own.steps.mean():.0f}", f"{own.seconds.mean():.1f}"])
    return lines


@click.command()
@click.option("--data", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.option("--only", default=",".join(CHANGES), help="Names of variants, joined by commas. [default: all]")
@click.option("--base", default="published", show_default=True)
@click.option("--every", default=1, show_default=True, type=click.IntRange(1), help="Take every n-th image.")
@click.option("--at", default=257, show_default=True, help="Fitted size of all variants that do not change it.")
def main(data: Path, out: Path, only: str, base: str, every: int, at: int) -> None:
    """Fit the variants, score them, compare them with the base."""
    names = list(dict.fromkeys([base, *only.split(",")]))
    try:
        methods = [Method(name, name, i, variant(name, at).label_map) for i, name in enumerate(names)]
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    found = find_cases(data, "auto", None)
    cases = found.cases[::every]
    prepare_folder(out)
    store = Store(out, Settings(257, 0, "cpu", resolve(None, "cpu", torch.float32)))
    outcome = evaluate(cases, methods, RULE_OF_LAYOUT[found.layout], store)
    for name, problem in outcome.failures.items():
        click.echo(f"failed: {name}: {problem}", err=True)
    header = ["variant", *(cell for protocol in SHOWN for cell in (protocol, "difference")), "labels", "steps", "s"]
    table = [header, ["---"] * len(header), *compare(pd.DataFrame(outcome.rows), base, names)]
    text = "".join(f"| {' | '.join(line)} |\n" for line in table)
    with complete_file(out / "study.md") as temporary:
        temporary.write_text(f"{len(cases)} images, layout {found.layout}\n\n{text}", encoding="utf-8")
    make_console().print(text, markup=False)


if __name__ == "__main__":
    main()
