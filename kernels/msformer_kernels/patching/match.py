"""Finds what one module computes: plans from its structure, of which the first that is proved is taken."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from msformer_kernels.patching.classes import Proved, why_no_patched_class, why_no_subclass
from msformer_kernels.patching.likeness import likeness
from msformer_kernels.patching.plain import Part, part, why_not_followed, why_not_plain, why_touched
from msformer_kernels.patching.proof import TOLERANCE, Proof, Witness
from msformer_kernels.patching.structures import SEARCHES, Plan
from msformer_kernels.patching.structures.common import joined

BATCH = "BatchNorm uses the statistics of the batch"
"""Why a plan that takes the running ones does not hold where a BatchNorm is in training mode."""
_NARROW = {"float16", "half", "bfloat16", "finfo"}
"""Names in a forward that does something else below float32, which a proof in float64 does not show."""
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Match:
    proved: Proved
    error: float
    like: str | None = None
    """The module that was proved in place of this one, of which a proof would be the same."""


@dataclass(frozen=True)
class Outcome:
    """Of a proof: the plan that is true, or why there is none."""

    name: str
    """Of the module that was compared."""
    why_not: str | None = None
    error: float = math.inf
    in_training: str = ""
    """Why the plan does not hold in training; empty if it does."""
    narrow: bool = True
    """See `Proved`."""
    witness: Witness | None = None
    """With the plan; None without one."""

    def holds_for(self, module: nn.Module) -> bool:
        """Whether it is that of a module that is alike; one that is left alone is not looked at again."""
        return self.witness is None or self.witness.agrees(module)


Known = dict[Hashable, Outcome]
"""Proofs, by what they depend on."""


def match(
    name: str, module: nn.Module, children: dict[str, Plan], plans: Iterable[Plan], known: Known
) -> Match | str | None:
    """What a module computes; why an operator does not, of a module that looks like one; None for any other.

    `plans` are those of other modules, which are tried first. `known` are the proofs so far; a new one is added.
    """
    if not module._modules or type(module) in _CONTAINERS:
        return None
    if any(is_lazy(parameter) for parameter in module.parameters()):
        return "it has parameters without a shape; patch it after a first call"
    answers = [search(module, children) for search in SEARCHES]
    first = set(plans)
    likely = sorted((plan for answer in answers for plan in answer.plans), key=lambda plan: plan not in first)
    alike = any(answer.alike for answer in answers)
    if not likely:
        return next((answer.why_not for answer in answers if answer.why_not), None)
    if any(parameter.is_meta for parameter in module.parameters()):
        return "it is on the meta device; patch it when its parameters have values"
    why = _why_not_bypassed(module, likely[0]) if alike else None
    if why is not None:
        return why
    allowed = [plan for plan in likely if _why_not_bypassed(module, plan) is None]
    return _prove(name, module, allowed or likely, alike, known)


def _prove(name: str, module: nn.Module, plans: list[Plan], alike: bool, known: Known) -> Match | str | None:
    facts = likeness(module)
    key = None if facts is None else (facts, frozenset(plans))
    outcome = None if key is None else known.get(key)
    if outcome is None or not outcome.holds_for(module):
        outcome = _compared(name, module, plans, alike)
        if key is not None:
            known.setdefault(key, outcome)
    if outcome.witness is None:
        return outcome.why_not
    plan = outcome.witness.plan
    why = _why_not_bypassed(module, plan)
    if why is not None:
        return why
    parts = _parts(module, plan, outcome.in_training)
    asks = any(part.reads & _NARROW for part in parts)  # it may clip what overflows there
    proved = Proved(plan, parts, outcome.narrow and not asks)
    why = why_no_patched_class(type(module), proved)
    if why is not None:
        return why
    return Match(proved, outcome.error, None if outcome.name == name else outcome.name)


def _compared(name: str, module: nn.Module, plans: list[Plan], alike: bool) -> Outcome:
    """The first of the plans that is true."""
    try:
        proof = Proof(module)
    except ValueError as problem:
        return Outcome(name, str(problem) if alike else None)
    nearest, where, failed = math.inf, plans[0], ""
    for plan in plans:
        try:
            error = proof.error(plan, training=False)
        except Exception as problem:  # of a module that we know nothing of
            failed = failed or f"{type(problem).__name__}: {problem}"
            continue
        if error <= TOLERANCE:
            plan, why_not = _laid(proof, plan)
            if why_not:
                return Outcome(name, why_not)
            plan, in_training = _in_training(proof, plan)
            witness = proof.witness(plan)
            lost = next((joined(*key) for key in proof.kept() if not _is_called(key[0], plan)), None)
            if lost is not None:
                return Outcome(name, f"its forward sets {lost}, which would be lost")
            return Outcome(name, None, error, in_training, proof.keeps_dtypes(plan), witness)
        if error < nearest:
            nearest, where = error, plan
    if not alike and (math.isinf(nearest) or proof.makes_pairs(where) is not False):
        return Outcome(name)
    if math.isinf(nearest):
        return Outcome(name, f"it cannot be compared with {plans[0].title}: {failed or 'outputs of another shape'}")
    nearest_one = f"{where.title} ({where.options()}) comes nearest and differs by {nearest:.1e}"
    return Outcome(name, f"it computes something else: {nearest_one}")


def _laid(proof: Proof, plan: Plan) -> tuple[Plan, str]:
    """The plan with the layout that the module's own outputs have; and why there is none."""
    whys = []
    for other in plan.layouts():
        whys.append(proof.why_not_laid(other, training=False))
        if not whys[-1]:
            return other, ""
    return plan, whys[0]


def _in_training(proof: Proof, plan: Plan) -> tuple[Plan, str]:
    """The plan, or one that holds in training as well where it does not; and why none does."""
    first = proof.why_not_in_training(plan)
    for other in plan.for_training(proof.module) if first else ():
        if not proof.why_not_in_training(other):
            return other, ""
    return plan, first


def _bypassed(module: nn.Module, plan: Plan) -> Iterable[tuple[str, nn.Module]]:
    """The submodules that the plan does not call, and that are in none that it calls; under each of their names."""
    for name, child in module.named_modules(remove_duplicate=False):
        if name and not _is_called(name, plan):
            yield name, child


def _is_called(name: str, plan: Plan) -> bool:
    """Whether a plan calls the submodule of this name, or one that it is in."""
    return any(name == c or name.startswith(f"{c}.") for c in plan.called())


def _why_not_bypassed(module: nn.Module, plan: Plan) -> str | None:
    """Why a module's own forward has to run, whatever it computes; None if it need not."""
    why = why_no_subclass(module)
    if why is None and "forward" in module.__dict__:
        why = "it has another patch: a forward of its own"
    if why is None and module._buffers:
        why = f"it has a buffer: {next(iter(module._buffers))}"
    why = why or why_not_followed("", module)
    if why is not None:
        return why
    for name, child in _bypassed(module, plan):
        why = why_not_plain(name, child) if name in plan.fused() else why_touched(name, child, False)
        if why is None and name not in plan.fused() and child._buffers:
            why = f"{name} has a buffer: {next(iter(child._buffers))}"
        why = why or why_not_followed(name, child)
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
