"""Finds what one module computes: plans from its structure, of which the first that is proved is taken."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from msformer_kernels.patching.classes import Proved, why_no_subclass
from msformer_kernels.patching.plain import Part, part, why_not_plain, why_touched
from msformer_kernels.patching.proof import TOLERANCE, Proof
from msformer_kernels.patching.structures import SEARCHES, Plan

BATCH = "BatchNorm uses the statistics of the batch"
"""Why a plan that takes the running ones does not hold where a BatchNorm is in training mode."""
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Match:
    proved: Proved
    error: float


def match(module: nn.Module, children: dict[str, Plan], known: Iterable[Plan]) -> Match | str | None:
    """What a module computes; why an operator does not, of a module that looks like one; None for any other.

    `known` are plans of other modules; they are tried first.
    """
    if not module._modules or type(module) in _CONTAINERS:
        return None
    answers = [search(module, children) for search in SEARCHES]
    first = set(known)
    plans = sorted((plan for answer in answers for plan in answer.plans), key=lambda plan: plan not in first)
    alike = any(answer.alike for answer in answers)
    if not plans:
        return next((answer.why_not for answer in answers if answer.why_not), None)
    if any(parameter.is_meta for parameter in module.parameters()):
        return "it is on the meta device; patch it when its parameters have values"
    why = _why_not_bypassed(module, plans[0]) if alike else None
    if why is not None:
        return why
    return _prove(module, plans, alike)


def _prove(module: nn.Module, plans: list[Plan], alike: bool) -> Match | str | None:
    try:
        proof = Proof(module)
    except ValueError as problem:
        return str(problem) if alike else None
    nearest, where, failed = math.inf, plans[0], ""
    for plan in plans:
        try:
            error = proof.error(plan, training=False)
        except Exception as problem:  # of a module that we know nothing of
            failed = failed or f"{type(problem).__name__}: {problem}"
            continue
        if error <= TOLERANCE:
            why = _why_not_bypassed(module, plan)
            if why is not None:
                return why
            return Match(Proved(plan, _parts(module, plan, proof.why_not_in_training(plan))), error)
        if error < nearest:
            nearest, where = error, plan
    if not alike:
        return None
    if math.isinf(nearest):
        return f"it cannot be compared with {plans[0].title}: {failed or 'outputs of another shape'}"
    return f"it computes something else: {where.title} ({where.options()}) comes nearest and differs by {nearest:.1e}"


def _bypassed(module: nn.Module, plan: Plan) -> Iterable[tuple[str, nn.Module]]:
    """The submodules that the plan does not call, and that are in none that it calls; under each of their names."""
    called = plan.called()
    for name, child in module.named_modules(remove_duplicate=False):
        if name and not any(name == c or name.startswith(f"{c}.") for c in called):
            yield name, child


def _why_not_bypassed(module: nn.Module, plan: Plan) -> str | None:
    """Why a module's own forward has to run, whatever it computes; None if it need not."""
    why = why_no_subclass(module)
    if why is None and "forward" in module.__dict__:
        why = "it has another patch: a forward of its own"
    if why is None and module._buffers:
        why = f"it has a buffer: {next(iter(module._buffers))}"
    if why is not None:
        return why
    for name, child in _bypassed(module, plan):
        why = why_not_plain(name, child) if name in plan.fused() else why_touched(name, child, False)
        if why is None and name not in plan.fused() and child._buffers:
            why = f"{name} has a buffer: {next(iter(child._buffers))}"
        if why is not None:
            return why
    return None


def _parts(module: nn.Module, plan: Plan, in_training: str) -> tuple[Part, ...]:
    """What the plan relies on; `in_training`: why it does not hold there, whatever the BatchNorms do."""
    fused, evaluated = plan.fused(), plan.evaluated()
    below = (
        part(tuple(name.split(".")), child, name in fused, in_training or BATCH * (name in evaluated))
        for name, child in _bypassed(module, plan)
    )
    return (part((), module, False, in_training), *below)
