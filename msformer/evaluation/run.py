"""A run of an evaluation: fit what is not there yet, score all of it.

An image that fails is reported with its name and does not stop the run. Scores come from the kept label maps, at the
fitted size; the Dice coefficient at the image's own size stands beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from msformer.baselines import Method
from msformer.evaluation.layouts import Case
from msformer.evaluation.measures import UNDEFINED, OwnSize, measure, speckle
from msformer.evaluation.pairs import Pair, read_pair, rule_of
from msformer.evaluation.protocols import predictions
from msformer.evaluation.store import Fitted, Store
from msformer.io.prepare import resize_labels
from msformer.output import OutputError, printable
from msformer.progress import RunProgress
from msformer_kernels import BackendError

Row = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a run found."""

    rows: list[Row]
    """A row for each image, method and protocol: see `score`."""
    failures: dict[str, str]
    """Error by image, or by image and method."""


def evaluate(cases: Sequence[Case], methods: Sequence[Method], rule: str, store: Store) -> Outcome:
    """All methods on all images; image by image, so that an interrupted run has whole images.

    Raises:
        OutputError, BackendError: nothing can be written, or the backend is not available.
    """
    missing = sum(not store.has(method, case) for case in cases for method in methods)
    with RunProgress(len(cases) * len(methods), "label maps", to_make=missing) as progress:
        return _evaluate(cases, methods, rule, store, progress)


def _evaluate(
    cases: Sequence[Case], methods: Sequence[Method], rule: str, store: Store, progress: RunProgress
) -> Outcome:
    rows: list[Row] = []
    failures: dict[str, str] = {}
    for case in cases:
        try:
            pair = read_pair(case)
            chosen = rule_of(case, pair, rule)
            _check_object(case, pair, store.settings.size)
        except (ValueError, OSError, MemoryError) as error:
            failures[case.name] = printable(str(error))
            progress.ended(case.name, f"failed: {failures[case.name]}", items=len(methods))
            continue
        for method in methods:
            name = f"{case.name}, {method.title}"
            try:
                fitted = store.load(method, case)
                if fitted is None:
                    fitted = store.fit(method, case, pair, progress.start(name))
                    progress.ended(name, f"{len(set(fitted.labels.flat))} labels, {fitted.seconds:.1f} s")
                else:
                    progress.skipped()
                rows += score(case, pair, method, fitted, chosen)
            except (OutputError, BackendError):
                raise
            except (ValueError, OSError, FloatingPointError, RuntimeError, MemoryError) as error:
                failures[name] = printable(str(error))
                progress.ended(name, f"failed: {failures[name]}")
    return Outcome(rows, failures)


def _check_object(case: Case, pair: Pair, size: int) -> None:
    """Raises ValueError for an object of which no pixel is left at the fitted size."""
    if pair.truth.any() and not resize_labels(pair.truth, (size, size)).any():
        raise ValueError(f"{case.mask}: its {pair.truth.sum()} pixels vanish at {size} x {size}; take a larger --size")


def score(case: Case, pair: Pair, method: Method, fitted: Fitted, rule: str) -> list[Row]:
    """A row a protocol: image, method, protocol, rule of the blind score, the fields of `Measures`, dsc_full (at the
    image's own size), whether mask and prediction are empty, labels and speckle of the map, steps and seconds of its
    fit.

    Where the true mask is empty, protocols that look at it would find nothing by looking; they get no measures.
    """
    size = (fitted.labels.shape[0], fitted.labels.shape[1])
    truth = resize_labels(pair.truth, size)
    own_size = OwnSize(pair.truth, size)
    made = {
        "labels": len(set(fitted.labels.flat)),
        "speckle": speckle(fitted.labels),
        "steps": fitted.steps,
        "seconds": fitted.seconds,
    }
    blind = fitted.blind(rule, pair.image)
    rows = []
    for protocol, predicted in predictions(fitted.labels, truth, blind).items():
        fair = protocol == "blind" or truth.any()
        rows.append(
            {
                "image": case.name,
                "method": method.name,
                "protocol": protocol,
                "rule": rule,
                **(measure(predicted, truth) if fair else UNDEFINED)._asdict(),
                "dsc_full": own_size.dice(predicted) if fair else None,
                "empty_truth": not truth.any(),
                "empty_prediction": not predicted.any(),
                **made,
            }
        )
    return rows
