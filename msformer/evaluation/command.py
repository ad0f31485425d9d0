"""``msformer evaluate``: from a folder of images and masks to a report."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch
from rich.table import Table
from rich.text import Text

import msformer
from msformer.baselines import Method, choose_methods
from msformer.claim import claimed
from msformer.evaluation.layouts import Case, Found, find_cases
from msformer.evaluation.masks import parse_labels
from msformer.evaluation.models import is_model, model_methods
from msformer.evaluation.page import Report, write_page
from msformer.evaluation.pairs import check_labels
from msformer.evaluation.protocols import GATE, PROTOCOLS
from msformer.evaluation.run import Outcome, evaluate
from msformer.evaluation.store import Settings, Store
from msformer.evaluation.summary import markdown, percent, summarise, write_csv
from msformer.io.read import Reading
from msformer.messages import complain, console, say, tell, tell_at_end, warn
from msformer.options import make_executor, of_usage
from msformer.output import complete_file, write_json
from msformer.runs.plan import settings_line
from msformer.segmentation import find_device
from msformer.selection import AUTO
from msformer.text import markdown_text, visible
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
    dry_run: bool = False,
) -> dict[str, str]:
    """Evaluates and writes the report, or says what that would be; returns the failures.

    Raises:
        click.UsageError: an unknown method, a label that is none.
        ValueError: no image with a mask; masks with several labels of which none
            was asked for, or none of which has the one that was; every image failed.
        OSError: a path that does not exist, or a report that cannot be written.
    """
    names = [name.strip() for name in methods.split(",")]
    if ablation and names != ["all"]:
        raise click.UsageError(f"--ablation says which methods, got --methods {methods!r} as well")
    if masks is not None and layout not in ("auto", "pairs"):
        raise click.UsageError(f"--masks is for --layout pairs, got --layout {layout}")
    plain = [name for name in names if not is_model(name)]
    with of_usage("--methods"):
        chosen = choose_methods([*plain, *FLOORS], ablation)
    with of_usage("--label"):
        labels = parse_labels(label)
    device = str(find_device(device))
    chosen += model_methods([name for name in names if is_model(name)], device)
    found = find_cases(data, layout, masks, exclude=(out,), labels=labels)
    if window is not None:
        found = replace(found, cases=tuple(replace(case, window=Reading(window).window) for case in found.cases))
    if modality is not None:
        found = replace(found, cases=tuple(replace(case, modality=modality) for case in found.cases))
    rule = RULE_OF_LAYOUT[found.layout] if select == AUTO else select
    settings = Settings(size, seed, device, resolve(backend, torch.device(device).type, torch.float32))
    executor = make_executor(cluster, threads, device, at_once=None, here=1)
    cases = found.cases[:limit]
    check_labels(cases)
    for problem in found.problems:
        warn(f"left out: {problem}")
    store = Store(out, settings)
    about = {"layout": found.layout, "rule": rule, "methods": [method.name for method in chosen]}
    tell("start", images=len(cases), out=out, settings=asdict(settings) | about, dry_run=dry_run)
    if dry_run:
        return _preview(cases, chosen, store, about)
    with claimed(out):
        outcome = evaluate(cases, chosen, rule, store, executor)
        if not outcome.rows:
            raise ValueError(f"every image failed, the first with: {next(iter(outcome.failures.values()))}")
        maps = len(outcome.rows) // len(PROTOCOLS)
        counts = {"images": len(cases), "maps": maps, "done": maps - outcome.skipped, "skipped": outcome.skipped}
        tell_at_end(counts=counts | {"failed": len(outcome.failures)})
        _write(out, found, chosen, settings, outcome, executor.facts)
    return outcome.failures


def _preview(
    cases: Sequence[Case], methods: Sequence[Method], store: Store, about: Mapping[str, Any]
) -> dict[str, str]:
    """Says what would be made, and writes nothing; returns the errors of images that cannot be read."""
    failures: dict[str, str] = {}
    made = 0
    for case in cases:
        try:
            missing = [method.name for method in methods if store.load(method, case) is None]
        except (ValueError, OSError) as error:
            failures[case.name] = str(error)
            complain(f"would fail: {case.name}: {error}")
            tell("image", name=case.name, status="would fail", error=str(error))
            continue
        made += len(missing)
        say(f"{case.image}, mask {case.mask}: {'would run ' + ', '.join(missing) if missing else 'done already'}")
        status = "would run" if missing else "would skip"
        tell("image", name=case.name, source=case.image, mask=case.mask, status=status, methods=missing)
    maps = (len(cases) - len(failures)) * len(methods)
    counts = {"images": len(cases), "maps": maps, "done": made, "skipped": maps - made, "failed": len(failures)}
    say(f"settings: {settings_line(asdict(store.settings))}; layout {about['layout']}, blind rule {about['rule']}")
    say(f"would make {made} of {maps} label maps of {len(cases)} images in {store.root}; nothing was written")
    tell_at_end(dry_run=True, counts=counts, out=store.root)
    return failures


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
        complain(f"not in report.html: {name}: {error}")
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
        complain(f"failed: {name}: {error}")
    table = Table(title="Mean DSC, %")
    table.add_column("method")
    for protocol in PROTOCOLS:
        table.add_column(protocol, justify="right")
    means = report.summary.set_index(["method", "protocol"]).dsc
    for method in report.methods:
        cells = [means.get((method.name, protocol), float("nan")) for protocol in PROTOCOLS]
        table.add_row(Text(visible(method.title)), *(percent(value) for value in cells))
    console().print(table)
    images = report.scores.image.nunique()
    files = ["report.html", "report.md", "summary.csv", "scores.csv"]
    say(f"{images} images in {out}: {', '.join(files)}")
    tell_at_end(out=out, files=[*files, "run.json"], summary=report.summary.to_dict("records"))


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
