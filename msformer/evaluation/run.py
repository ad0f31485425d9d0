"""A run of an evaluation: fit what is not there yet, score all of it, here or on a cluster.

An image that fails is reported with its name and does not stop the run. Scores come from the kept label maps, at the
fitted size; the Dice coefficient at the image's own size stands beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from msformer.baselines import Method
from msformer.evaluation.layouts import Case
from msformer.evaluation.measures import UNDEFINED, Measures, OwnSize, measure, speckle
from msformer.evaluation.pairs import Pair, read_pair, rule_of
from msformer.evaluation.protocols import predictions
from msformer.evaluation.store import Fitted, Settings, Store
from msformer.io.prepare import resize_labels
from msformer.messages import is_heard, tell
from msformer.output import NameRefused, OutputError, printable
from msformer.progress import RunProgress
from msformer.runs.executors import Executor, Local, Report
from msformer_kernels import BackendError

Row = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a run found."""

    rows: list[Row]
    """A row for each image, method and protocol: see `score`."""
    failures: dict[str, str]
    """Error by image, or by image and method."""
    skipped: int = 0
    """Label maps that were there before."""


@dataclass(frozen=True)
class Asked:
    """A method on an image, to be scored. The method is a number, since others' weights need not come along."""

    case: Case
    place: tuple[int, int]
    """Of the image among the cases, and of the method among the methods of the run."""
    rule: str
    """Of the blind score."""
    fitted: Fitted | None
    """What was made before."""


class Scorer:
    """Makes the label maps that are missing and scores them, in this process or another one. Keeps the last image."""

    def __init__(self, methods: Sequence[Method], settings: Settings) -> None:
        self.methods = tuple(methods)
        self.settings = settings
        self._last: tuple[Case, Pair] | None = None

    def pair(self, case: Case) -> Pair:
        """As `read_pair`."""
        if self._last is None or self._last[0] != case:
            self._last = None  # not two images in memory at a time
            self._last = case, read_pair(case)
        return self._last[1]

    def __call__(self, asked: Asked, folder: Path, report: Report) -> list[Row]:
        """The rows of `score`. A label map that is made is kept in the `Store` of the folder."""
        pair, method = self.pair(asked.case), self.methods[asked.place[1]]
        fitted = asked.fitted or Store(folder, self.settings).fit(method, asked.case, pair, report)
        return score(asked.case, pair, method, fitted, asked.rule)


def evaluate(
    cases: Sequence[Case], methods: Sequence[Method], rule: str, store: Store, executor: Executor | None = None
) -> Outcome:
    """All methods on all images; image by image, so that an interrupted run has whole images.

    Args:
        executor: where that happens; in this process by default.

    Raises:
        OutputError, BackendError: nothing can be written, or the backend is not available.
    """
    run = _Run(cases, methods, rule, store)
    missing = sum(not store.has(method, case) for case in cases for method in methods)
    with (
        executor or Local(at_once=1) as entered,
        RunProgress(len(cases) * len(methods), "label maps", to_make=missing) as progress,
    ):
        return run.outcome(entered, progress)


class _Run:
    def __init__(self, cases: Sequence[Case], methods: Sequence[Method], rule: str, store: Store) -> None:
        self.cases, self.methods, self.rule, self.store = cases, methods, rule, store
        self.scorer = Scorer(methods, store.settings)
        self.rows: dict[tuple[int, int], list[Row]] = {}
        self.failures: dict[tuple[int, int], tuple[str, str]] = {}
        """Image, or image and method, and error, by place."""
        self.skipped = 0

    def outcome(self, executor: Executor, progress: RunProgress) -> Outcome:
        def start(asked: Asked) -> Report:
            return progress.start(self.name(asked)) if asked.fitted is None else lambda *done: None

        with closing(executor.run(self.scorer, self.asked(progress), self.store.root, start)) as outcomes:
            for asked, scored in outcomes:
                with self.failing(asked.place, self.name(asked), progress):
                    rows = self.rows[asked.place] = scored.result()
                    if asked.fitted is None:
                        made = f"{rows[0]['labels']} labels, {rows[0]['seconds']:.1f} s"
                        progress.ended(self.name(asked), made)
                    else:
                        progress.skipped()
                        self.skipped += 1
                    if is_heard():
                        self.tell_of(asked, rows)
        rows = [row for place in sorted(self.rows) for row in self.rows[place]]
        return Outcome(rows, dict(self.failures[place] for place in sorted(self.failures)), self.skipped)

    def tell_of(self, asked: Asked, rows: list[Row]) -> None:
        """The event of a label map: its record, and its scores by protocol."""
        method, case = self.methods[asked.place[1]], asked.case
        status = "done" if asked.fitted is None else "skipped"
        record = self.store.record(method, case)
        scores = {row["protocol"]: {name: row[name] for name in (*Measures._fields, "dsc_full")} for row in rows}
        tell("map", image=case.name, source=case.image, method=method.name, status=status, record=record, scores=scores)

    def name(self, asked: Asked) -> str:
        return f"{asked.case.name}, {self.methods[asked.place[1]].title}"

    def asked(self, progress: RunProgress) -> Iterator[Asked]:
        """All that is to be scored; images that cannot be read are left out."""
        for i, case in enumerate(self.cases):
            chosen = None
            with self.failing((i, 0), case.name, progress, items=len(self.methods)):
                pair = self.scorer.pair(case)
                _check_object(case, pair, self.store.settings.size)
                chosen = rule_of(case, pair, self.rule)
            if chosen is None:
                continue
            for j, method in enumerate(self.methods):
                asked = None
                with self.failing((i, j), f"{case.name}, {method.title}", progress):
                    self.store.check_names(method, case)
                    asked = Asked(case, (i, j), chosen, self.store.load(method, case))
                if asked is not None:
                    progress.begin()
                    yield asked

    @contextmanager
    def failing(self, place: tuple[int, int], name: str, progress: RunProgress, items: int = 1) -> Iterator[None]:
        """What goes wrong with an image, or with a method on it, is said and does not end the run."""
        try:
            yield
        except (ValueError, OSError, FloatingPointError, RuntimeError, MemoryError) as error:
            if isinstance(error, OutputError | BackendError) and not isinstance(error, NameRefused):
                raise
            reason = printable(str(error)) or type(error).__name__
            self.failures[place] = name, reason
            progress.ended(name, f"failed: {reason}", items=items)
            method = None if items > 1 else self.methods[place[1]].name
            tell("map", image=self.cases[place[0]].name, method=method, status="failed", error=reason)


def _check_object(case: Case, pair: Pair, size: int) -> None:
    """Raises ValueError for an object of which no pixel is left at the fitted size."""
    if pair.truth.any() and not resize_labels(pair.truth, (size, size)).any():
        raise ValueError(f"{case.mask}: its {pair.truth.sum()} pixels vanish at {size} x {size}; take a larger --size")


def score(case: Case, pair: Pair, method: Method, fitted: Fitted, rule: str) -> list[Row]:
    """A row a protocol: image, method, protocol, rule of the blind score, the fields of `Measures`, dsc_full (at the
    image's own size), whether mask and prediction are empty, labels and speckle of the map, steps and seconds of its
    fit.

    Where the true mask is empty, protocols that look at it would find nothing by looking; they get no measures. Void
    pixels are neither true nor predicted.
    """
    size = (fitted.labels.shape[0], fitted.labels.shape[1])
    truth = resize_labels(pair.truth, size)
    own_size = OwnSize(pair.truth, size, pair.void)
    made = {
        "labels": len(set(fitted.labels.flat)),
        "speckle": speckle(fitted.labels),
        "steps": fitted.steps,
        "seconds": fitted.seconds,
    }
    labels, blind = fitted.labels.astype(np.int64), fitted.blind(rule, pair.image)
    if pair.void is not None:  # a label of its own, which no true pixel has
        void = resize_labels(pair.void, size)
        labels[void], truth, blind = labels.max() + 1, truth & ~void, blind & ~void
    rows = []
    for protocol, predicted in predictions(labels, truth, blind).items():
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
