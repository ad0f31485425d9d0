"""One model of another library, as it is, compiled, and patched; see `benchmarks.integrations`.

    python -m benchmarks.integration_row NAME FILE

A process of its own measures each model, so that what one leaves in memory, or the end of one, does not touch the next.
"""

from __future__ import annotations

import copy
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

import msformer_kernels
from msformer.output import write_json
from msformer_kernels.patching.command import forward, tensors, training_step
from msformer_kernels.patching.memory import peak_memory
from msformer_kernels.patching.timing import medians

from .integration_models import MODELS, ForeignModel, Inputs
from .machine import OtherPrograms

ORIGINAL, COMPILE, PATCHED, BOTH = "original", "compile", "patched", "patched, compiled"
FORWARD, TRAINING = "forward", "forward + backward"
MEASURED, SKIPPED, FAILED = "measured", "skipped", "failed"
ALLOWED = 1e-2
"""Relative difference from the original's output; in float32 the originals are off by up to 1e-3 themselves."""
FEW = 3
"""Samples of a large model, at most."""


@dataclass
class IntegrationRow:
    """What was found; times are seconds, memory bytes."""

    model: str
    status: str = FAILED
    reason: str = ""
    """Why nothing was measured."""
    versions: dict[str, str] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    """Shapes."""
    samples: int = 0
    replaced: dict[str, int] = field(default_factory=dict)
    """How many, by the operator."""
    left_alone: dict[str, int] = field(default_factory=dict)
    """How many, by class and reason."""
    error: float | None = None
    """The largest of the proofs, in float64."""
    compile_failures: dict[str, str] = field(default_factory=dict)
    """By rival."""
    differences: dict[str, float] = field(default_factory=dict)
    """Of the output from the original's, relative, by rival."""
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    """By passes and rival."""
    memory: dict[str, int | None] = field(default_factory=dict)
    """That a training step adds at its peak, by rival."""
    other_programs: float | None = None
    """Cores that were busy with something else meanwhile."""

    def gain(self, passes: str, over: str, of: str = PATCHED) -> float | None:
        """Time of a rival over that of another, by default of the patched model."""
        times = self.seconds.get(passes, {})
        return times[over] / times[of] if over in times and of in times else None

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> IntegrationRow:
        known = {item.name for item in fields(cls)}
        return cls(**{name: value for name, value in content.items() if name in known})


def measure(model: ForeignModel, samples: int, compile_limit: float) -> IntegrationRow:
    """The row of a model, skipped where a package is missing.

    Args:
        samples: of each time; a large model takes at most `FEW`.
        compile_limit: seconds for each `torch.compile` in each of the two modes; 0 leaves it out.
    """
    row = IntegrationRow(model.name, reason=model.missing() or "")
    if row.reason:
        row.status = SKIPPED
        return row
    torch.manual_seed(0)
    rivals, inputs = {ORIGINAL: model.make()}, model.inputs()
    row.versions, row.inputs = model.versions(), [str(tuple(x.shape)) for x in tensors(inputs)]
    row.samples = min(samples, FEW) if model.large else samples
    rivals[PATCHED] = copy.deepcopy(rivals[ORIGINAL])
    _patch(rivals[PATCHED], inputs, row)
    others = OtherPrograms()
    row.differences[PATCHED] = _difference(rivals[PATCHED], rivals[ORIGINAL], inputs)
    if row.differences[PATCHED] > ALLOWED:
        row.reason = f"the output of the patched model is off by {row.differences[PATCHED]:.1g}"
        return row
    if compile_limit:
        for name, of in ((COMPILE, ORIGINAL), (BOTH, PATCHED)):
            _add_compiled(name, of, rivals, inputs, row, compile_limit)
    for passes, step in ((FORWARD, forward), (TRAINING, training_step)):
        names = [name for name in (ORIGINAL, COMPILE, PATCHED, BOTH) if name in rivals]
        models = [rivals[name].train(passes == TRAINING) for name in names]
        found = medians(lambda m, step=step: step(m, inputs), models, row.samples)  # type: ignore[misc]
        row.seconds[passes] = dict(zip(names, found, strict=True))
    row.other_programs = others.cores()
    row.memory = {name: _training_memory(rival, inputs) for name, rival in rivals.items()}
    row.status = MEASURED
    return row


def _patch(model: nn.Module, inputs: Inputs, row: IntegrationRow) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "patch: nothing was replaced", UserWarning)  # the row says it
        report = msformer_kernels.patch(model, example=inputs)
    row.replaced = dict(Counter(r.by for r in report.replaced))
    # what was measured is not the same for any two modules
    row.left_alone = dict(Counter(f"{r.class_name}: {r.reason.partition(':')[0]}" for r in report.refused))
    row.error = max((r.error for r in report.replaced), default=None)


def _add_compiled(
    name: str, of: str, rivals: dict[str, nn.Module], inputs: Inputs, row: IntegrationRow, limit: float
) -> None:
    """The rival `of`, compiled, unless that fails or gives other results; the row says so."""
    compiled: Any = torch.compile(copy.deepcopy(rivals[of]))
    try:
        with time_limit(limit):
            row.differences[name] = _difference(compiled, rivals[ORIGINAL], inputs)
        if row.differences[name] > ALLOWED:
            row.compile_failures[name] = f"its output is off by {row.differences[name]:.1g}"
            return
        with time_limit(limit):
            training_step(compiled.train(), inputs)
        rivals[name] = compiled
    except Exception as error:  # whatever the compiler raises
        row.compile_failures[name] = in_short(error)


def in_short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the block once the time is over; main thread only."""

    def end(*_: object) -> None:
        raise TimeoutError(f"not compiled within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@torch.no_grad()
def _difference(model: nn.Module, original: nn.Module, inputs: Inputs) -> float:
    """Of the outputs in evaluation mode, the largest, relative."""
    found, expected = (list(tensors(m.eval()(*inputs))) for m in (model, original))
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def _training_memory(model: nn.Module, inputs: Inputs) -> int | None:
    step: Callable[[], None] = lambda: training_step(model.train(), inputs)  # noqa: E731
    return peak_memory(step, model)


@click.command()
@click.argument("name", type=click.Choice(tuple(MODELS)))
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--samples", type=click.IntRange(1), required=True)
@click.option("--threads", type=click.IntRange(1), required=True)
@click.option("--compile-limit", type=click.FloatRange(0), required=True)
def main(name: str, file: Path, samples: int, threads: int, compile_limit: float) -> None:
    """Measures one model and writes its row as JSON."""
    torch.set_num_threads(threads)
    write_json(file, asdict(measure(MODELS[name], samples, compile_limit)))


if __name__ == "__main__":
    main()
