"""Goes through the numbers of recipes, judges each, and makes those that fail smaller."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from msformer_kernels import BackendError
from tests.kernels.fuzzing.judge import exercise, faults
from tests.kernels.fuzzing.recipe import Recipe, shrunk

MOST_SECONDS = 20.0
"""To make a failing recipe smaller."""


class NotServed(Exception):
    """The backend does not take the call, and says so; or the reference does not, either."""


def judged(recipe: Recipe, coarse: bool = False) -> list[str]:
    """What is wrong, errors that are raised among it. Raises NotServed for a call that is refused for a reason."""
    try:
        return faults(recipe, coarse)
    except BackendError as error:
        if recipe["backend"] != "native":
            raise NotServed(str(error)) from error
        return [f"raised {error!r}"]
    except Exception as error:
        try:
            exercise(recipe.changed(backend="reference"))
        except Exception as expected:
            raise NotServed(str(expected)) from expected
        return [f"raised {error!r}"]


def fails(recipe: Recipe) -> bool:
    try:
        return bool(judged(recipe))
    except NotServed:
        return False


def made_smaller(recipe: Recipe) -> Recipe:
    """The simplest recipe that still fails, of those that were tried."""
    until, simpler = time.monotonic() + MOST_SECONDS, True
    while simpler:
        simpler = False
        for candidate in shrunk(recipe):
            if time.monotonic() > until:
                return recipe
            try:
                found = fails(candidate)
            except (ValueError, TypeError, KeyError):  # the rest of the recipe does not fit it
                continue
            if found:
                recipe, simpler = candidate, True
                break
    return recipe


@dataclass
class Findings:
    counts: Counter[str] = field(default_factory=Counter)
    """Of calls by operator, and of those that were not served."""
    failures: list[tuple[Recipe, list[str]]] = field(default_factory=list)
    stopped: bool = False
    """The time was over."""


def search(recipes: Iterable[Recipe], until: float, shrink: bool = True, coarse: bool = False) -> Findings:
    """Judges the recipes until `time.monotonic()` is `until`."""
    findings = Findings()
    for recipe in recipes:
        if time.monotonic() > until:
            findings.stopped = True
            break
        try:
            found = judged(recipe, coarse)
        except NotServed:
            findings.counts["not served"] += 1
            continue
        findings.counts[recipe.operator] += 1
        if found:
            smaller = made_smaller(recipe) if shrink else recipe
            findings.failures.append((smaller, judged(smaller, coarse)))
    return findings
