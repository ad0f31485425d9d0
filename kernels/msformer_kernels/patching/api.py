"""The public function: finds, proves, replaces and reports."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from msformer_kernels.patching.classes import plan_of
from msformer_kernels.patching.gain import Gain, measured
from msformer_kernels.patching.match import Known, Match, match
from msformer_kernels.patching.report import Refusal, Replacement, Report
from msformer_kernels.patching.structures import Plan
from msformer_kernels.patching.structures.common import joined

Only = Iterable[str] | Callable[[str, nn.Module], bool]


def patch(
    model: nn.Module,
    *,
    only: Only | None = None,
    dry_run: bool = False,
    example: Sequence[Any] | None = None,
    min_gain: float = 1.05,
) -> Report:
    """Runs the MixFFN and efficient attention in a model through the fused operators.

    Modules are found by their structure, and replaced only if the operator computes what they do: in float64, on a copy
    with random weights, output and all gradients. Then the *class* of the instance becomes a subclass of its own class,
    with another forward. Parameters, their names, hooks on the module, `isinstance`, copies and pickles stay what they
    were. A call runs the module's own forward where an inner layer was replaced, wrapped, hooked or set differently
    since, and in training where the module draws random numbers (dropout) or uses the statistics of the batch
    (BatchNorm).

    Args:
        model: any module; itself and its submodules are looked at.
        only: full names of submodules (as `named_modules` gives them), or a function of name and module that says
            whether one may be replaced. All by default.
        dry_run: reports, and changes nothing.
        example: arguments of a call of the model. With it every module is timed at the sizes that it gets there, and
            left alone where the gain is below `min_gain`, in the forward or in forward + backward. Without it modules
            whose gain depends on the size are left alone.
        min_gain: original time over patched time; 0 replaces whatever was proved, without timing.

    Returns:
        what was replaced and what was not, and why; `Report.undo` puts the model back, also at the end of a ``with``.

    Raises:
        TypeError: model is not a module, example is no sequence.
        ValueError: `only` names a module that is not there.

    Warns:
        UserWarning: nothing was replaced.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if example is not None and not isinstance(example, (tuple, list)):
        raise TypeError(f"example: expected a tuple of the arguments of a call, got {type(example).__name__}")
    wanted = _wanted(model, only)
    modules = dict(model.named_modules())
    report, found, plans, already = Report(dry_run=dry_run), dict[str, Match](), dict[str, Plan](), False
    known: Known = {}
    for name in reversed(modules):  # children before their parents
        module, plan = modules[name], plan_of(modules[name])
        if plan is not None:
            plans[name], already = plan, True
        elif wanted(name):
            children = {c: plans[full] for c, _ in module.named_children() if (full := joined(name, c)) in plans}
            result = match(name, module, children, plans.values(), known)
            if isinstance(result, str):
                report.refused.append(Refusal(name, type(module).__name__, result))
            elif result is not None:
                found[name], plans[name] = result, result.proved.plan
    named = [*found, *(refusal.name for refusal in report.refused)]
    report.refused = [r for r in report.refused if not any(_is_inside(n, r.name) for n in named)]
    notes = _without_gain(model, modules, found, report, example, min_gain)
    order = {name: at for at, name in enumerate(modules)}
    report.refused.sort(key=lambda refusal: order[refusal.name])
    for name in sorted(found, key=lambda name: order[name]):
        proved, plan = found[name].proved, found[name].proved.plan
        words = [notes[name]] if name in notes else []
        words += [f"as {found[name].like}"] * (found[name].like is not None)
        words += [f"its own forward in training, where {why}" for why in proved.in_training]
        row = Replacement(
            name, type(modules[name]).__name__, plan.title, plan.options(), found[name].error, "; ".join(words)
        )
        report.replaced.append(row)
    if not dry_run:
        for name, matched in found.items():
            report.put_in_place(name, modules[name], matched.proved)
    if not found and not already:
        why = "; ".join(sorted({f"{r.class_name}: {r.reason}" for r in report.refused})) or "no module looks like one"
        warnings.warn(f"patch: nothing was replaced in {type(model).__name__}: {why}", UserWarning, stacklevel=2)
    return report


def _wanted(model: nn.Module, only: Only | None) -> Callable[[str], bool]:
    """Whether a module of this name may be replaced."""
    if only is None:
        return lambda name: True
    modules = dict(model.named_modules(remove_duplicate=False))
    if callable(only):
        return lambda name: bool(only(name, modules[name]))
    names = {only} if isinstance(only, str) else set(only)
    missing = sorted(names - modules.keys())
    if missing:
        raise ValueError(f"only: the model has no module {', '.join(map(repr, missing))}")
    wanted = {id(modules[name]) for name in names}  # a module may have several names
    return lambda name: id(modules[name]) in wanted


def _is_inside(name: str, outer: str) -> bool:
    return name != outer and (outer == "" or name.startswith(f"{outer}."))


def _without_gain(
    model: nn.Module,
    modules: dict[str, nn.Module],
    found: dict[str, Match],
    report: Report,
    example: Sequence[Any] | None,
    min_gain: float,
) -> dict[str, str]:
    """Takes the modules that do not gain out of `found`; what was measured of the others, in words."""
    if min_gain <= 0:
        return {}
    gains: dict[str, Gain | None] = {}
    if example is not None:
        gains = measured(model, {name: modules[name] for name in found}, found, example)
    notes: dict[str, str] = {}
    for name in list(found):
        gain, unmeasured = gains.get(name), found[name].proved.plan.needs_example
        if gain is not None and gain.least >= min_gain:
            notes[name] = str(gain)
        elif gain is not None or unmeasured is not None:
            why = str(unmeasured) if gain is None else f"it gains too little here: {gain}, min_gain is {min_gain:g}"
            report.refused.append(Refusal(name, type(modules[name]).__name__, why))
            del found[name]
        elif example is not None:
            notes[name] = "not called by the example"
    return notes
