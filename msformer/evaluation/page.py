"""The report as one self-contained HTML page: tables, box plots, and a gallery of every image with every method's
map.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from msformer.baselines import Method
from msformer.drawing import drawn, svg
from msformer.evaluation.layouts import Case
from msformer.evaluation.pairs import read_pair
from msformer.evaluation.protocols import PROTOCOLS
from msformer.evaluation.store import Store
from msformer.evaluation.summary import header, percent, table_rows
from msformer.io.prepare import resize_image, resize_labels
from msformer.output import complete_file
from msformer.page import rendered
from msformer.pictures import outline, overlay, picture_url, shaded

THUMBNAIL = (160, 160)
"""Height and width of a picture in the gallery, pixels."""


@dataclass(frozen=True)
class Report:
    """What the page shows."""

    about: dict[str, str]
    explanation: str
    """Of the tables."""
    headings: dict[str, str]
    """Of the table of each protocol."""
    summary: pd.DataFrame
    scores: pd.DataFrame
    methods: tuple[Method, ...]
    failures: dict[str, str]
    left_out: tuple[str, ...]
    """A line for each file without its image or mask."""


@dataclass(frozen=True)
class Shown:
    """A method's result on an image in the gallery."""

    number: int
    """Of the method, from 1."""
    title: str
    maps: str
    blind: str
    scores: dict[str, str]
    """Dice coefficient by protocol, in percent; "-" if there is none."""


def write_page(report: Report, cases: Sequence[Case], store: Store, path: Path) -> dict[str, str]:
    """Writes the page; label maps come from the store. Returns the errors of images that cannot be shown."""
    missing: dict[str, str] = {}

    def gallery() -> Iterator[tuple[str, str, str, list[Shown]]]:
        for case in cases:
            try:
                shown = _pictures(case, report, store)
            except (ValueError, OSError, MemoryError) as error:  # gone since it was scored
                missing[case.name] = str(error)
            else:
                yield case.name, *shown

    tables = [
        (protocol, heading, header(report.summary), table_rows(report.summary, protocol), box_plot(report, protocol))
        for protocol, heading in report.headings.items()
    ]
    parts = rendered(
        "msformer.evaluation",
        "page.html",
        "page.js",
        about=report.about,
        failures=report.failures,
        left_out=report.left_out,
        explanation=report.explanation,
        methods=report.methods,
        tables=tables,
        gallery=gallery(),
        protocols=PROTOCOLS,
        width=THUMBNAIL[1],
    )
    with complete_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(parts)
    return missing


def _pictures(case: Case, report: Report, store: Store) -> tuple[str, str, list[Shown]]:
    """The image, the image with the true border, and what each method made of it."""
    pair = read_pair(case)
    pixels, truth = _pixels(resize_image(pair.image, THUMBNAIL)), resize_labels(pair.truth, THUMBNAIL)
    scores = report.scores[report.scores.image == case.name].set_index(["method", "protocol"])
    dsc, rule = scores.dsc, scores.rule.iloc[0]
    shown = []
    for number, method in enumerate(report.methods, start=1):
        fitted = store.load(method, case)
        if fitted is None or (method.name, "blind") not in dsc.index:
            continue
        labels, chosen = (resize_labels(x, THUMBNAIL) for x in (fitted.labels, fitted.blind(rule, pair.image)))
        shown.append(
            Shown(
                number,
                method.title,
                picture_url(outline(overlay(pixels, labels), truth)),
                picture_url(outline(shaded(pixels, chosen), truth)),
                {protocol: percent(dsc[method.name, protocol]) for protocol in PROTOCOLS},
            )
        )
    return picture_url(pixels), picture_url(outline(pixels, truth)), shown


def _pixels(image: Tensor) -> NDArray[np.uint8]:
    """``[3, h, w]`` in [0, 1] -> ``[h, w, 3]``."""
    return np.asarray((image.permute(1, 2, 0) * 255).round().numpy(), dtype=np.uint8)


def box_plot(report: Report, protocol: str) -> Markup:
    """SVG: the Dice coefficients of each method over the images, every image a dot."""
    names = [drawn(method.title) for method in report.methods]
    figure = Figure(figsize=(7, 0.6 + 0.36 * len(report.methods)), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    values = [list(_dice_of(report, protocol, method)) for method in report.methods]
    axes.boxplot(values, orientation="horizontal", widths=0.6, showfliers=False, medianprops={"color": "#d55e00"})
    random = np.random.default_rng(0)
    for row, dots in enumerate(values, start=1):
        axes.plot(dots, row + random.uniform(-0.18, 0.18, len(dots)), ".", color="#0072b2", alpha=0.45, markersize=4)
    axes.set_yticks(range(1, len(values) + 1), [name.pop("text") for name in names])
    for label, fonts in zip(axes.get_yticklabels(), names, strict=True):
        label.set(**fonts)
    axes.invert_yaxis()
    axes.set_xlim(-2, 102)
    axes.set_xlabel("DSC, %")
    axes.grid(axis="x", alpha=0.3)
    return svg(figure, f"Dice coefficients of each method, {protocol}: box plots with a dot an image")


def _dice_of(report: Report, protocol: str, method: Method) -> Iterator[float]:
    chosen = (report.scores.protocol == protocol) & (report.scores.method == method.name)
    return (100 * value for value in report.scores[chosen].dsc.dropna())
