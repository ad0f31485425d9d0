"""Tables of an evaluation: means over images with 95% bootstrap intervals, as Markdown and CSV.

Every method is also compared with the last one, MS-Former in the tables of the paper: by the mean of the differences
of the Dice coefficients, image by image, which tells more than whether two intervals overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import bootstrap

from msformer.baselines import Method
from msformer.evaluation.protocols import PROTOCOLS
from msformer.evaluation.run import Row
from msformer.output import complete_file
from msformer.text import cell_text, markdown_text

MEASURES = {
    "dsc": "DSC",
    "hm": "HM",
    "xor": "XOR",
    "jaccard": "Jaccard",
    "precision": "precision",
    "recall": "recall",
    "hd95": "HD95, px",
    "dsc_full": "DSC, own size",
}
"""Columns of the rows of a run, and their names in tables; all but HD95 in percent there."""
RESAMPLES = 2000


def mean_and_interval(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Mean and 95% percentile-bootstrap interval over images; NaN where there is nothing to say."""
    if len(values) == 0:
        return np.nan, np.nan, np.nan
    if len(values) == 1 or np.ptp(values) == 0:
        return float(values.mean()), *((np.nan, np.nan) if len(values) == 1 else (float(values[0]),) * 2)
    found = bootstrap((values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0))
    return float(values.mean()), float(found.confidence_interval.low), float(found.confidence_interval.high)


def summarise(rows: Sequence[Row], methods: Sequence[Method]) -> pd.DataFrame:
    """A line for each protocol and method, in their orders.

    Columns: protocol, method, title, images (those that any method has results for), empty_truths, empty_predictions,
    labels, speckle, steps, seconds (means), and for each of `MEASURES`, and for ``difference``, the DSC less that of
    the last method, its mean, ``_low``, ``_high`` and ``_count``, the images it could be computed for.
    """
    scores = pd.DataFrame(rows)
    lines = []
    for protocol in PROTOCOLS:
        last = _by_image(scores, protocol, methods[-1].name)
        for method in methods:
            some = scores[(scores.protocol == protocol) & (scores.method == method.name)]
            line = {
                "protocol": protocol,
                "method": method.name,
                "title": method.title,
                "images": scores.image.nunique(),
                "empty_truths": int(some.empty_truth.sum()),
                "empty_predictions": int(some.empty_prediction.sum()),
                **{name: float(some[name].mean()) for name in ("labels", "speckle", "steps", "seconds")},
            }
            columns = {name: some[name].astype(float) for name in MEASURES}
            columns["difference"] = _by_image(scores, protocol, method.name) - last
            for name, column in columns.items():
                values = column.dropna().to_numpy()
                line[name], line[f"{name}_low"], line[f"{name}_high"] = mean_and_interval(values)
                line[f"{name}_count"] = len(values)
            lines.append(line)
    return pd.DataFrame(lines)


def _by_image(scores: pd.DataFrame, protocol: str, method: str) -> pd.Series:
    """The Dice coefficients of a method, by the name of the image."""
    some = scores[(scores.protocol == protocol) & (scores.method == method)]
    return some.set_index("image").dsc.astype(float)


def percent(value: float) -> str:
    """With one digit; "-" for NaN."""
    return "-" if np.isnan(value) else f"{100 * value:.1f}"


def cell(line: pd.Series, name: str) -> str:
    """A mean with its interval, in percent but for HD95: ``81.2 [78.0, 84.1]``."""
    if np.isnan(line[name]):
        return "-"
    factor, sign = 1 if name == "hd95" else 100, "+" if name == "difference" else ""
    mean, low, high = (f"{factor * line[name + end]:{sign}.1f}" for end in ("", "_low", "_high"))
    interval = "" if np.isnan(line[f"{name}_low"]) else f" [{low}, {high}]"
    missing = line["images"] - line[f"{name}_count"]
    return f"{mean}{interval}" + (f" (without {missing})" if missing else "")


def header(summary: pd.DataFrame) -> list[str]:
    """Of the columns of `table_rows`."""
    difference = f"less {summary.title.iloc[-1]}"
    names = ["method", *MEASURES.values(), "empty predictions", "labels", "speckle", "s an image"]
    return [*names[:2], difference, *names[2:]]


def table_rows(summary: pd.DataFrame, protocol: str) -> list[list[str]]:
    """The cells of the table of one protocol, a line a method."""
    lines = summary[summary.protocol == protocol]
    return [
        [
            line["title"],
            cell(line, "dsc"),
            "" if line["method"] == summary.method.iloc[-1] else cell(line, "difference"),
            *(cell(line, name) for name in list(MEASURES)[1:]),
            str(line["empty_predictions"]),
            "-" if np.isnan(line["labels"]) else f"{line['labels']:.1f}",
            percent(line["speckle"]),
            "-" if np.isnan(line["seconds"]) else f"{line['seconds']:.1f}",
        ]
        for _, line in lines.iterrows()
    ]


def markdown(summary: pd.DataFrame, headings: dict[str, str]) -> str:
    """A table a protocol under its heading."""
    columns = header(summary)
    parts = []
    for protocol, heading in headings.items():
        names = list(map(markdown_text, columns))
        cells = [[markdown_text(row[0]), *row[1:]] for row in table_rows(summary, protocol)]
        lines = [names, ["---", *["---:"] * (len(columns) - 1)], *cells]
        parts.append(f"### {heading}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Whole or not at all; text as `cell_text` writes it."""
    names = table.select_dtypes(exclude=["number", "bool"])
    shown = table.assign(**{name: names[name].map(_cell) for name in names})
    with complete_file(path) as temporary:
        shown.to_csv(temporary, index=False)


def _cell(value: Any) -> Any:
    return cell_text(value) if isinstance(value, str) else value
