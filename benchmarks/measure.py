"""One case: results are compared, then the rivals take turns, with the caches flushed before each sample.

Is a result right? Compared with the exact form, the clean one in float64, before anything is timed.

The error of an output or a gradient is its largest difference, relative to its largest exact value. Two exceptions:
gradients that cancel to nearly nothing are rounding and no more, as that of the key bias is, so none is measured by
less than a hundredth of the largest gradient of a parameter. And in bfloat16, which "medium" rounds to, and of the
whole model, the gradients of all parameters count as one vector, by its Euclidean norm. In the model many of them
cancel, those of every bias before a BatchNorm. And under autocast PyTorch sums the gradients of a LayerNorm's weight
and bias over tokens with errors of 12 % at 129 x 129 tokens, and that is what its users get. In bfloat16 that vector
may be off by more than the outputs: in a fitting step, the rounding already changes which label some pixels have.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from msformer.memory import kept_memory
from msformer_kernels.core.precision import float32_products

from .cases import Case, Work
from .machine import Ceilings, OtherPrograms, limited_memory
from .rivals import EXACT, backend_of, backends
from .rows import FAILED, MEASURED, WRONG, Row, new_row
from .workloads import Candidate, make_candidate

# by type; "high" lets PyTorch round to tf32, "medium" to bfloat16
TOLERANCE = {"float32 highest": 1e-3, "float32 high": 5e-3, "float32 medium": 6e-2, "bfloat16": 6e-2}
JOINED_TOLERANCE = TOLERANCE | {"float32 medium": 0.2, "bfloat16": 0.2}
SMALLEST_SCALE = 1e-2
_GRADIENT, _JOINED = "grad.", "parameter gradients"


@dataclass(frozen=True)
class Deviation:
    """The error that is the worst for what is allowed, the result it is in, and what is allowed there."""

    error: float
    where: str
    allowed: float

    @property
    def is_right(self) -> bool:
        return self.error <= self.allowed  # NaN is not


def deviation(found: dict[str, Tensor], exact: dict[str, Tensor], kind: str, joined: bool) -> Deviation:
    """Of a rival's results from the exact ones; NaN where they are NaN.

    `kind` is a type such as "float32 highest" and says what is allowed; `joined` takes the gradients of all parameters
    as one vector.

    Raises:
        ValueError: results that are missing, or of another shape.
    """
    if found.keys() != exact.keys():
        raise ValueError(f"results: expected {', '.join(exact)}, got {', '.join(found)}")
    for name, value in exact.items():
        if found[name].shape != value.shape:
            raise ValueError(f"{name}: expected shape {tuple(value.shape)}, got {tuple(found[name].shape)}")
    gradients = [name for name in exact if name.startswith(_GRADIENT)]
    floor = SMALLEST_SCALE * max((_largest(exact[name]) for name in gradients), default=0.0)
    errors = {
        name: _ratio(_largest(found[name].double() - value), max(_largest(value), floor if name in gradients else 0.0))
        for name, value in exact.items()
        if not joined or name not in gradients
    }
    if joined and gradients:
        differences = [(found[name].double() - exact[name]).flatten() for name in gradients]
        norm = torch.cat([exact[name].flatten() for name in gradients]).norm().item()
        errors[_JOINED] = _ratio(torch.cat(differences).norm().item(), norm)
    deviations = [
        Deviation(error, name, (JOINED_TOLERANCE if name == _JOINED else TOLERANCE)[kind])
        for name, error in errors.items()
    ]
    return max(deviations, key=lambda found: math.inf if math.isnan(found.error) else found.error / found.allowed)


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _ratio(difference: float, scale: float) -> float:
    if difference == 0:
        return 0.0
    return difference / scale if scale else math.inf


SHORTEST_SAMPLE = 5e-3
"""Seconds; a call that takes less is repeated within a sample."""
MOST_CALLS = 1000
Report = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How long to measure."""

    rounds: int
    patience: float = 240.0
    """Seconds for the rounds of a case; after three rounds the rest is left out when they are over."""
    keep_memory: bool = True
    """Whether freed memory stays with the process between fitting steps, as in `msformer.segment`; for every rival."""


def measure_case(
    case: Case,
    rivals: Iterable[str],
    settings: Settings,
    ceilings: Ceilings,
    flush: Callable[[], object],
    report: Report,
    make: Callable[[Case, str], Candidate] = make_candidate,
) -> list[Row]:
    """The rows of a case. `report` is told what is going on."""
    rows = {rival: new_row(case, rival) for rival in rivals}
    candidates: dict[str, Candidate] = {}
    torch.compiler.reset()
    with conditions(case, settings.keep_memory):
        report("exact result")
        source, exact = exact_results(case, make)
        for rival, row in rows.items():
            report(f"check {rival}")
            row.exact = source
            candidate = checked(case, rival, row, exact, make)
            if candidate is not None:
                candidates[rival] = candidate
        exact.clear()
        _time(candidates, rows, settings, flush, report)
        for rival in list(candidates):
            row, candidate = rows[rival], candidates.pop(rival)
            if row.seconds is not None:
                report(f"memory of {rival}")
                row.peak_memory = candidate.peak()
                set_share(row, ceilings)
    return list(rows.values())


def set_share(row: Row, ceilings: Ceilings) -> None:
    """Fills in the share of the ceiling, where there is a time."""
    if row.seconds is not None:
        rate = ceilings.flop_rate(row.type, row.rival)
        row.share_of_ceiling = Work(row.flop, row.bytes).seconds(rate, ceilings.bytes_per_second) / row.seconds


@contextmanager
def conditions(case: Case, keep_memory: bool) -> Iterator[None]:
    """What every rival of a case is made and measured under; `keep_memory` as in `Settings`."""
    allocation = kept_memory() if keep_memory and case.operation == "step" else nullcontext()
    with limited_memory(), allocation, float32_products(case.precision):
        yield


def exact_results(case: Case, make: Callable[[Case, str], Candidate]) -> tuple[str, dict[str, Tensor]]:
    """Results in float64, and what made them. None at all, and the reason, where no form could make them.

    The clean form needs the most memory in float64. Where that is not there, a backend takes its place, which the tests
    compare with it.
    """
    reasons = []
    for name in (EXACT, *(f"{backend} {EXACT}" for backend in backends())):
        try:
            candidate = make(case, name)
            candidate.run()
            return f"{backend_of(name)}, float64", candidate.results()
        except (RuntimeError, MemoryError) as error:
            reasons.append(_reason(error))
        gc.collect()
    return f"no exact result: {'; '.join(reasons)}", {}


def checked(
    case: Case, rival: str, row: Row, exact: Mapping[str, Tensor], make: Callable[[Case, str], Candidate]
) -> Candidate | None:
    """The rival, if its results are right; the row says what is wrong otherwise."""
    if not exact:
        row.reason = row.exact
        return None
    try:
        candidate = make(case, rival)
        row.mode = candidate.mode
        candidate.run()
        found = deviation(candidate.results(), dict(exact), case.type, case.joins_gradients)
    except Exception as error:
        row.status, row.reason = FAILED, _reason(error)
        return None
    finally:
        gc.collect()
    row.error = found.error if math.isfinite(found.error) else None
    row.error_where = found.where
    if not found.is_right:
        row.status = WRONG
        row.reason = f"{found.where} is off by {found.error:.2g}, allowed is {found.allowed:g}"
        return None
    row.status = MEASURED
    return candidate


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _time(
    candidates: dict[str, Candidate],
    rows: Mapping[str, Row],
    settings: Settings,
    flush: Callable[[], object],
    report: Report,
) -> None:
    """Fills in the samples. A rival that fails on the way loses those it has."""
    report("warm up")
    calls = calls_a_sample(min(_warm_up(candidates, rows), default=1.0))
    others = OtherPrograms()
    for number in range(settings.rounds):
        if number >= 3 and others.seconds() > settings.patience:
            break
        report(f"round {number + 1} of {settings.rounds}")
        for rival in in_turn(list(candidates), number):
            row = rows[rival]
            flush()
            try:
                row.samples.append(candidates[rival].sample(calls))
                row.calls = calls
            except Exception as error:
                row.status, row.reason, row.samples = FAILED, _reason(error), []
                del candidates[rival]
    for row in rows.values():
        row.other_programs = others.cores()


def _warm_up(candidates: dict[str, Candidate], rows: Mapping[str, Row]) -> list[float]:
    """Seconds of one more call of each."""
    found = []
    for rival, candidate in list(candidates.items()):
        try:
            found.append(candidate.sample(1))
        except Exception as error:
            rows[rival].status, rows[rival].reason = FAILED, _reason(error)
            del candidates[rival]
    return found


def in_turn(names: list[str], number: int) -> list[str]:
    """The order of a round: each begins with the next one."""
    first = number % len(names) if names else 0
    return names[first:] + names[:first]


def calls_a_sample(seconds: float) -> int:
    """So many that a sample of calls that take this long is not too short."""
    return min(MOST_CALLS, math.ceil(SHORTEST_SAMPLE / max(seconds, 1e-9)))
