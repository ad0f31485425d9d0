"""``msformer doctor``, and ``msformer info``, which is the same without the self-test."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from msformer.commands.base import DONE, FAILED, Command
from msformer.messages import complain, console, say, tell, tell_at_end

if TYPE_CHECKING:
    from msformer.doctor.facts import Facts
    from msformer.doctor.selftest import Verdict


@click.command(cls=Command, goes_on=False)
def doctor() -> None:
    """Look at the installation: what is used and why, a self-test of a few seconds, and advice.

    The self-test compares results and gradients of every operator with float64, beside eager PyTorch's, and times both.
    """
    from msformer.doctor.selftest import self_test

    facts = _look()
    verdicts = list(self_test(list(facts.backends)))
    for verdict in verdicts:
        tell("test", **asdict(verdict))
    _print_verdicts(verdicts)
    failed = [verdict for verdict in verdicts if verdict.problem]
    _advise(facts, verdicts)
    for verdict in failed:
        complain(f"failed: {verdict.operator}, {verdict.device}, {verdict.dtype}: {verdict.problem}")
    tell_at_end(counts={"tests": len(verdicts), "failed": len(failed)})
    sys.exit(FAILED if failed else DONE)


@click.command(cls=Command, goes_on=False)
def info() -> None:
    """Print what `doctor` does, without the self-test."""
    _advise(_look(), ())


def _look() -> Facts:
    from msformer.doctor.facts import gather

    facts = gather()
    tell("facts", **facts.record())
    for name, value in _lines(facts):
        say(f"{name:<14}{value}")
    return facts


def _lines(facts: Facts) -> list[tuple[str, str]]:
    """What is printed of the facts: a name and a value each."""
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    complete = [extra.name for extra in facts.extras if not extra.missing]
    lacking = [f"{extra.name} (no {', '.join(extra.missing)})" for extra in facts.extras if extra.missing]
    threads = f"threads {facts.threads}, cores {facts.cores}"
    lines = [
        ("versions", versions),
        ("extras", ", ".join(complete) or "none"),
        *([("not complete", ", ".join(lacking))] if lacking else []),
        ("system", facts.machine["system"]),
        ("processor", f"{facts.machine['processor']}, {threads}"),
    ]
    if facts.variants:
        others = ", ".join(facts.variants[1:])
        tiles = f"; no amx: {facts.no_tiles}" if facts.no_tiles else ""
        lines.append(("CPU kernels", f"{facts.variants[0]} (also here: {others}{tiles})"))
    lines += [("GPU", gpu) for gpu in facts.gpus] or [("GPU", f"none: {facts.no_gpu}")]
    for device, operators in facts.backends.items():
        by_backend: dict[str, list[str]] = {}
        for operator, backend in operators.items():
            by_backend.setdefault(f"{backend.name} ({backend.why})", []).append(operator)
        lines += [(f"on {device}", f"{backend}: {', '.join(names)}") for backend, names in by_backend.items()]
        lines += [("", f"not {name}: {reason}") for name, reason in facts.unused[device].items()]
    lines += [("environment", f"{name}={value}") for name, value in facts.environment.items()]
    return lines


def _print_verdicts(verdicts: Sequence[Verdict]) -> None:
    from rich.table import Table

    table = Table(title="Self-test: relative errors and milliseconds, with gradients", box=None, pad_edge=False)
    for column in ("operator", "type", "backend"):
        table.add_column(column, no_wrap=True)
    for column in ("error", "eager's", "ms", "eager's"):
        table.add_column(column, justify="right", no_wrap=True)
    for each in verdicts:
        numbers = [_number(each.error, ".1e"), _number(each.eager_error, ".1e")]
        numbers += [_number(each.milliseconds, ".2f"), _number(each.eager_milliseconds, ".2f")]
        backend = f"{each.backend}{'' if each.device == 'cpu' else f', {each.device}'}"
        table.add_row(each.operator, each.dtype, backend, *numbers)
    console().print(table)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _advise(facts: Facts, verdicts: Sequence[Verdict]) -> None:
    from msformer.doctor.advice import advice

    sentences = list(advice(facts, verdicts))
    for sentence in sentences:
        tell("advice", message=sentence)
        say(f"advice: {sentence}")
    if not sentences:
        say("no advice: everything is used that is there")
