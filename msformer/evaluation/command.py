"""``msformer evaluate``: from a folder of images and masks to a report."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import msformer
from msformer.baselines import Method, choose_methods
from msformer.claim import claimed
from msformer.evaluation.layouts import Found, find_cases
from msformer.evaluation.masks import parse_labels
from msformer.evaluation.models import is_model, model_methods
from msformer.evaluation.page import Report, write_page
from msformer.evaluation.pairs import check_labels
from msformer.evaluation.protocols import GATE, PROTOCOLS
from msformer.evaluation.run import Outcome, evaluate
from msformer.evaluation.store import Settings, Store
from msformer.evaluation.summary import markdown, percent, summarise, write_csv
from msformer.io.read import Reading
from msformer.options import make_executor
from msformer.output import complete_file, write_json
from msformer.segmentation import find_device
from msformer.selection import AUTO, RULES
from msformer.text import markdown_text, say, visible
from msformer_kernels.core.backends import resolve

FLOORS = ("everything", "otsu")
"""Methods in every table, so that no number stands there without what the simplest guess gets."""
RULE_OF_LAYOUT = {"ph2": "lesion", "isic": "lesion", "lung": "lung", "pairs": AUTO}


def run(
    data: Path,
    masks: Path | None,
    layout: str,
    methods: str,
    ablation: bool,
    select: str,
    limit: int | None,
    label: Sequence[str],
    window: tuple[float, float] | None,
    modality: str | None,
    size: int,
    seed: int,
    device: str,
    backend: str | None,
    out: Path,
    cluster: str | None,
    threads: int | None,
) -> dict[str, str]:
    """Evaluates and writes the report; returns the failures.

    Raises:
        ValueError: an unknown method, layout or rule; no image with a mask; masks with several labels of which none
            was asked for, or none of which has the one that was; every image failed.
        OSError: a path that does not exist, or a report that cannot be written.
    """
    names = [name.strip() for name in methods.split(",")]
    if ablation and names != ["all"]:
        raise ValueError(f"methods: --ablation says which, got {methods!r} as well")
    plain = [name for name in names if not is_model(name)]
    chosen = choose_methods([*plain, *FLOORS], ablation)
    device = str(find_device(device))
    chosen += model_methods([name for name in names if is_model(name)], device)
    labels = parse_labels(label)
    found = find_cases(data, layout, masks, exclude=(out,), labels=labels)
    if window is not None:
        found = replace(found, cases=tuple(replace(case, window=Reading(window).window) for case in found.cases))
    if modality is not None:
        found = replace(found, cases=tuple(replace(case, modality=modality) for case in found.cases))
    if select not in (AUTO, *RULES):
        raise ValueError(f"select: unknown rule {select!r}; expected {AUTO}, {', '.join(RULES)}")
    rule = RULE_OF_LAYOUT[found.layout] if select == AUTO else select
    settings = Settings(size, seed, device, resolve(backend, torch.device(device).type, torch.float32))
    executor = make_executor(cluster, threads, device, at_once=None, here=1)
    cases = found.cases[:limit]
    check_labels(cases)
    for problem in found.problems:
        say(f"left out: {problem}", err=True)
    with claimed(out):
        outcome = evaluate(cases, chosen, rule, Store(out, settings), executor)
        if not outcome.rows:
            raise ValueError(f"every image failed, the first with: {next(iter(outcome.failures.values()))}")
        _write(out, found, chosen, settings, outcome, executor.facts)
    return outcome.failures


def _write(
    out: Path, found: Found, methods: tuple[Method, ...], settings: Settings, outcome: Outcome, place: dict[str, Any]
) -> None:
    scores = pd.DataFrame(outcome.rows)
    summary = summarise(outcome.rows, methods)
    rules = _rules(scores)
    about = {
        "command": shlex.join(["msformer", *sys.argv[1:]]),
        "data set": f"layout {found.layout}, {scores.image.nunique()} images" + _empty(scores),
        "fitted size": f"{settings.size} x {settings.size} pixels",
        "seed": str(settings.seed),
        "blind rule": rules,
        "msformer": f"{msformer.__version__}, backend {settings.backend}",
        "machine": f"{platform.platform()}, torch {torch.__version__}, {settings.device}",
    } | {name: ", ".join(f"{key} {value}" for key, value in facts.items()) for name, facts in place.items()}
    report = Report(about, EXPLANATION, headings_of(rules), summary, scores, methods, outcome.failures, found.problems)
    write_csv(scores, out / "scores.csv")
    write_csv(summary, out / "summary.csv")
    with complete_file(out / "report.md") as temporary:
        temporary.write_text(_markdown(report), encoding="utf-8")
    write_json(out / "run.json", {**about, "failures": outcome.failures, "left out": list(found.problems)})
    scored = [case for case in found.cases if case.name in set(scores.image)]
    for name, error in write_page(report, scored, Store(out, settings), out / "report.html").items():
        say(f"not in report.html: {name}: {error}", err=True)
    _print(report, out)


def _rules(scores: pd.DataFrame) -> str:
    """The rule of the blind score; where there are several, with the number of images of each."""
    counts = scores.groupby("image").rule.first().value_counts()
    return counts.index[0] if len(counts) == 1 else ", ".join(f"{rule} ({count})" for rule, count in counts.items())


def _empty(scores: pd.DataFrame) -> str:
    count = scores[scores.empty_truth].image.nunique()
    return f", {count} of them without an object" if count else ""


def _markdown(report: Report) -> str:
    parts = [
        f"# Evaluation\n\n{_listed(report.about.items())}",
        report.explanation,
        markdown(report.summary, report.headings),
    ]
    if report.failures:
        parts.append(f"## Failed\n\n{_listed(report.failures.items())}")
    if report.left_out:
        parts.append("## Left out\n\n" + "".join(f"- {markdown_text(problem)}\n" for problem in report.left_out))
    return "\n".join(parts)


def _listed(items: Iterable[tuple[str, str]]) -> str:
    return "".join(f"- {markdown_text(name)}: {markdown_text(value)}\n" for name, value in items)


def _print(report: Report, out: Path) -> None:
    """Failures, the mean Dice coefficients, and where everything is."""
    for name, error in report.failures.items():
        say(f"failed: {name}: {error}", err=True)
    table = Table(title="Mean DSC, %")
    table.add_column("method")
    for protocol in PROTOCOLS:
        table.add_column(protocol, justify="right")
    means = report.summary.set_index(["method", "protocol"]).dsc
    for method in report.methods:
        cells = [means.get((method.name, protocol), float("nan")) for protocol in PROTOCOLS]
        table.add_row(Text(visible(method.title)), *(percent(value) for value in cells))
    Console().print(table)
    images = report.scores.image.nunique()
    say(f"{images} images in {out}: report.html, report.md, summary.csv, scores.csv")


def headings_of(rules: str) -> dict[str, str]:
    """A heading for the table of each protocol; `rules` are those of the blind score."""
    return {
        "blind": f"Blind: labels chosen without the mask, by the rule {rules}",
        "oracle": "Oracle: the one label with the best DSC",
        "oracle-union": "Oracle union: every label that lies mostly in the mask",
        "published": f"As published: the label covering most of the mask, within the mask dilated by {GATE} pixels",
    }


EXPLANATION = """\
Means over images with 95% bootstrap intervals, in percent, HD95 in pixels of the fitted image. The blind score is what
a user without masks gets; a trained model finds the object itself, and no rule is asked. The oracle scores look at the
mask: what the label map holds, not what one finds. The published score multiplies the prediction by the dilated mask,
so that "everything" scores high by it; read no number of that table without the row "everything". Without an object in
the true mask, finding nothing counts as 100 in the blind score, and the other three leave the image out; so are
fractions of nothing, such as the precision of an empty prediction. "(without 2)" says that two images are left out. The
column "less …" compares every method with the last one: its DSC less the other's, image by image. Speckle is the share
of pixels that differ from both neighbours along their row, or along their column: maps with much of it are no pleasure
to look at.
"""
