"""Whether one call is right: the error rule of `benchmarks.accuracy` against eager PyTorch, where NaN and infinity come
out, the same bits on any number of threads, inputs that stay as they are.

In the tests a coarser rule holds, on every processor: those of special values are only run, and errors are far from
those of a wrong kernel.

The rule is applied twice. First to one draw and without the uncertainty of the reference, which costs five more runs
of it: what passes there passes the whole rule. What does not is judged by the whole rule, over more draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.accuracy import BOUND, Comparison, Results, Rule, uncertainty
from msformer_kernels.core.operator import OPERATORS
from msformer_kernels.core.precision import float32_products
from msformer_kernels.native import arguments
from tests.kernels.cases import Case, Tensors, cast, run
from tests.kernels.fuzzing.recipe import Recipe
from tests.kernels.fuzzing.values import OVERFLOWING
from tests.kernels.ops.shared import add_draw_of_precision, draw_once

DRAWS = (1, 4, 16)
"""A verdict is asked for after so many draws; a good one counts."""
DRAWS_OF_HIGH = 3
TINY = 64
"""Times the smallest normal number: sums of products that AMX tiles round to zero."""
REPEATED = 16.0
"""How many times the uncertainty, which is that of independent errors, is allowed where tokens or their gradients are
all the same; and in Triton's interpreter, whose sums go from one row to the next."""
COARSE = 32.0
"""Times eager's largest error, or the rounding of the largest value, by the coarse rule."""
TOKENS = ("", "x", "query", "key", "value")
"""What is not a parameter; "" is the first tensor, which never is."""
NOT_FINITE = ("nan", "inf", "negative_inf")
FLOAT64 = 1e-12
"""Of the largest value: what float64 results may differ by without a closer look."""
EPS_OF_PRODUCTS = {"highest": 0.0, "high": 2**-15, "medium": torch.finfo(torch.bfloat16).eps}
"""Of float32, where it is more than float32's own."""


@contextmanager
def as_asked(recipe: Recipe) -> Iterator[None]:
    """Threads and form of the recipe; new memory is full of NaN, so that what a kernel does not write shows."""
    new_empty, empty_like, threads = Tensor.new_empty, torch.empty_like, torch.get_num_threads()

    def fill(x: Tensor) -> Tensor:
        return x.fill_(float("nan") if x.is_floating_point() else 1)

    with ExitStack() as stack:
        stack.enter_context(patch.object(Tensor, "new_empty", lambda *a, **kw: fill(new_empty(*a, **kw))))
        stack.enter_context(patch.object(torch, "empty_like", lambda *a, **kw: fill(empty_like(*a, **kw))))
        stack.enter_context(patch.object(arguments, "FORM", getattr(arguments, recipe["form"].upper())))
        torch.set_num_threads(recipe["threads"])
        stack.callback(torch.set_num_threads, threads)
        yield


def exercise(recipe: Recipe) -> Results:
    """The outputs and gradients of the call, judged by nobody."""
    case = recipe.case()
    with as_asked(recipe), float32_products(recipe["precision"]):
        return run(case, cast(case.draw(), recipe.dtype), recipe["backend"])


def faults(recipe: Recipe, coarse: bool = False) -> list[str]:
    """What is wrong with the call; nothing if it is right. Raises BackendError where the backend does not serve it."""
    case = recipe.case()
    tensors = cast(case.draw(), recipe.dtype)
    before = {name: x.detach().clone() for name, x in tensors.items() if x is not None}
    with as_asked(recipe):
        with float32_products(recipe["precision"]):
            ours = run(case, tensors, recipe["backend"])
            found = _written(tensors, before) + _other_bits(recipe, case, tensors, ours)
        if found:
            return found
        if coarse:
            return _far_off(recipe, case, tensors, ours) if recipe.is_regular else []
        if not recipe.is_regular:
            return _misplaced(recipe, case, tensors, ours)
        return _inaccurate(recipe, case, tensors, ours)


def _written(tensors: Tensors, before: dict[str, Tensor]) -> list[str]:
    now = {name: x.detach() for name, x in tensors.items() if x is not None}
    return [f"{name}: was written to" for name, x in before.items() if not _same_bits(now[name], x)]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN equals NaN, whatever its sign, 0 is not -0."""
    as_numbers = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(a.dtype.itemsize, a.dtype)
    same = a.view(as_numbers) == b.view(as_numbers)
    return bool((same | (a.isnan() & b.isnan())).all())


def _other_bits(recipe: Recipe, case: Case, tensors: Tensors, ours: Results) -> list[str]:
    if recipe["threads"] == 1:
        return []
    torch.set_num_threads(1)
    alone = run(case, tensors, recipe["backend"])
    torch.set_num_threads(recipe["threads"])
    return [f"{name}: other bits than on one thread" for name, x in ours.items() if not _same_bits(x, alone[name])]


def _references(recipe: Recipe, case: Case, tensors: Tensors) -> tuple[Results, Results]:
    """Eager's results in the dtype, and the exact ones."""
    torch.set_num_threads(1)
    if recipe["at"] == "key_bias":  # which has no effect, but on rounding
        tensors = {**tensors, "key_bias": torch.zeros_like(tensors["key_bias"]).requires_grad_()}
    eager = run(case, tensors, "reference")
    exact = run(case, cast(tensors, torch.float64), "reference", {name: x.dtype for name, x in eager.items()})
    return eager, exact


def _far_off(recipe: Recipe, case: Case, tensors: Tensors, ours: Results) -> list[str]:
    eager, exact = _references(recipe, case, tensors)
    eps_of_products = EPS_OF_PRODUCTS[recipe["precision"]] if recipe["dtype"] == "f32" else 0.0
    found = []
    for name, value in exact.items():
        if not value.numel() or not eager[name].isfinite().all():
            continue
        relative = FLOAT64 if recipe["dtype"] == "f64" else max(eps_of_products, torch.finfo(recipe.dtype).eps)
        eager_error = (eager[name] - value).abs().max().item()
        allowed = COARSE * max(eager_error, relative * max(1.0, value.abs().max().item()))
        error = (ours[name] - value).abs().max().item()
        if not error <= allowed:
            found.append(f"{name}: largest error {error / allowed:.2f} x the coarse bound")
    return found


def _inaccurate(recipe: Recipe, case: Case, tensors: Tensors, ours: Results) -> list[str]:
    eager, exact = _references(recipe, case, tensors)
    if recipe.dtype == torch.float64:
        return _inaccurate_in_float64(case, tensors, ours, exact)
    if not all(x.isfinite().all() for x in eager.values()):
        return _misplaced(recipe, case, tensors, ours)  # beyond the largest float16
    rule = Rule()
    rule.add(ours, eager, exact, {name: torch.zeros_like(x) for name, x in exact.items()})
    if not rule.faults():
        return []
    if recipe["precision"] != "highest" and recipe["dtype"] == "f32":
        return _inaccurate_products(recipe, case)
    rule = Rule()
    for count in DRAWS:
        while rule.draws < count:
            draw_once(case, recipe.dtype, recipe["backend"], rule.draws, rule)
        if not (found := _faults_of(rule, recipe)):
            return []
    return found


def _faults_of(rule: Rule, recipe: Recipe) -> list[str]:
    """Those of the rule, but for errors that are within the uncertainty of the reference: random values may cancel to
    nothing in eager's order of operations and in no other."""
    most = REPEATED if recipe.repeats_itself or recipe["backend"] == "triton" else 1.0
    uncertain = {n for n, c in rule.comparisons.items() if math.sqrt(c.ours / c.values) <= most and c.worst <= most}
    return [fault for fault in rule.faults() if fault.partition(":")[0] not in uncertain]


def _inaccurate_products(recipe: Recipe, case: Case) -> list[str]:
    """The rules of tests/kernels/ops/test_precision.py."""
    rule = Rule()
    if recipe["precision"] == "high":
        for _ in range(DRAWS_OF_HIGH):
            add_draw_of_precision(rule, case, recipe["backend"], "high", nullcontext, EPS_OF_PRODUCTS["high"])
        worst = {name: c.worst for name, c in rule.comparisons.items() if not c.worst <= 1}
        return [f"{name}: largest error {error:.2f} x the bound" for name, error in worst.items()]
    for count in DRAWS:
        while rule.draws < count:
            add_draw_of_precision(rule, case, recipe["backend"], "medium", _autocast, EPS_OF_PRODUCTS["medium"])
        if not (found := _faults_of(rule, recipe)):
            return []
    return found


def _autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def _inaccurate_in_float64(case: Case, tensors: Tensors, ours: Results, exact: Results) -> list[str]:
    """The reference has errors, too: a result may differ by as much as that is uncertain."""

    def far_off(name: str) -> bool:
        return bool(((ours[name] - exact[name]).abs() > FLOAT64 * max(1.0, exact[name].abs().max().item())).any())

    found = [name for name, x in exact.items() if x.numel() and far_off(name)]
    if not found:
        return []

    def perturbed(arithmetic: Any) -> Results:
        inputs = {n: x if x is None else arithmetic.perturbed(x.detach()) for n, x in tensors.items()}
        given = {n: x if x is None or x.dtype == torch.bool else x.requires_grad_() for n, x in inputs.items()}
        return run(case, given, "reference")

    spread = uncertainty(perturbed, exact, torch.finfo(torch.float64).eps)
    comparisons = {name: Comparison() for name in found}
    for name, comparison in comparisons.items():
        comparison.add(ours[name], exact[name], exact[name], spread[name])
    return [f"{name}: largest error {c.worst:.2f} x the bound" for name, c in comparisons.items() if not c.worst <= 1]


def _misplaced(recipe: Recipe, case: Case, tensors: Tensors, ours: Results) -> list[str]:
    """Where NaN, infinity and what is finite come out, against eager in the dtype and the exact results.

    What is not finite among the tokens comes out in the elements where it does by eager or by the exact results, which
    may differ: eager's convolution adds 0 times what lies beside the image, or does not. What is not finite among the
    parameters comes out in the same outputs. Gradients may have more NaN where eager's have some, and, where an output
    is not finite already, less: sums that are folded differ in what they touch. Beside an infinite output, and with
    parameters that are not finite, they are not judged: activations switch by the sign of sums that are no numbers.
    """
    eager, exact = _references(recipe, case, tensors)
    zero = OPERATORS[recipe.operator].zero_gradient
    may_overflow, of_tokens = recipe["values"] in OVERFLOWING or recipe.is_regular, recipe["at"] in TOKENS
    shows = not all(x.isfinite().all() for name, x in ours.items() if name.startswith("output"))
    undefined = (shows and recipe["values"] != "nan") or (recipe["values"] in NOT_FINITE and not of_tokens)
    found, wrong = [], {}
    for name, value in exact.items():
        is_output = name.startswith("output")
        if not value.numel() or name.removeprefix("grad_") in zero or (undefined and not is_output):
            continue
        own, theirs = ours[name], eager[name]
        if (of_tokens if is_output else not shows) and (value.isnan() & own.isfinite()).any():
            found.append(f"{name}: finite where the exact result is NaN")
        if is_output and not may_overflow and not _same_places(own, theirs, value, of_tokens):
            found.append(f"{name}: NaN or infinity in other places than eager's")
        if not may_overflow and theirs.isfinite().all() and not own.isfinite().all():
            found.append(f"{name}: not finite, eager's is")
        if what := _wrong_numbers(
            own, theirs, value, _eps_of(recipe), 1.0 if recipe["values"] in (*OVERFLOWING, "big") else 0.0
        ):
            wrong[name] = what
    if wrong:  # numbers of very different sizes cancel in the reference, too
        spread = _uncertainty(recipe, case, tensors, exact)
        wrong = {n: w for n, w in wrong.items() if not _is_uncertain(ours[n], exact[n], spread[n])}
    return found + [f"{name}: {what}" for name, faults in wrong.items() for what in faults]


def _eps_of(recipe: Recipe) -> float:
    """The relative spacing of the numbers that the products of the call round to."""
    at_least = {"f32": EPS_OF_PRODUCTS[recipe["precision"]], "f64": FLOAT64}.get(recipe["dtype"], 0.0)
    return max(at_least, torch.finfo(recipe.dtype).eps)


def _same_places(ours: Tensor, eager: Tensor, exact: Tensor, of_tokens: bool) -> bool:
    own, theirs, right = ours.isfinite(), eager.isfinite(), exact.isfinite()
    if of_tokens:
        return bool(((own == theirs) | (own == right)).all())
    return bool(own.all()) in (bool(theirs.all()), bool(right.all()))


def _uncertainty(recipe: Recipe, case: Case, tensors: Tensors, exact: Results) -> Results:
    """How far off each value of the exact results is at most, if all is rounded as in the call; infinite where that
    leaves no number."""
    wide = cast(tensors, torch.float64)

    def perturbed(arithmetic: Any) -> Results:
        inputs = {n: x if x is None else arithmetic.perturbed(x.detach()) for n, x in wide.items()}
        given = {n: x if x is None or x.dtype == torch.bool else x.requires_grad_() for n, x in inputs.items()}
        return run(case, given, "reference", dtypes)

    dtypes = {name: x.dtype for name, x in run(case, tensors, "reference").items()}
    found = uncertainty(perturbed, exact, _eps_of(recipe))
    return {name: x.nan_to_num(torch.inf, torch.inf) for name, x in found.items()}


def _is_uncertain(ours: Tensor, exact: Tensor, spread: Tensor) -> bool:
    """Whether every finite number is right within the uncertainty of the reference."""
    both = ours.isfinite() & exact.isfinite()
    error = (ours.double() - exact).abs()[both]
    return bool((error <= BOUND * spread[both]).all())


def _wrong_numbers(ours: Tensor, eager: Tensor, exact: Tensor, eps: float, least: float) -> list[str]:
    """Of the finite numbers; `least` is what rounding errors are relative to at least."""
    limits = torch.finfo(ours.dtype)
    mine, theirs = ours.double(), eager.double()
    if ((exact.abs() > limits.max * (1 + 4 * max(eps, limits.eps))) & (mine.isfinite() | (mine == -exact))).any():
        return ["finite, or of the other sign, where the exact result is infinite"]
    both = exact.isfinite() & theirs.isfinite() & mine.isfinite()
    if not both.any():
        return []
    error, largest = (mine - exact)[both].abs().max().item(), exact[both].abs().max().item()
    rounding = max(eps, limits.eps) * max(least, largest)
    allowed = BOUND * max(rounding, (theirs - exact)[both].abs().max().item(), TINY * limits.tiny)
    return [] if error <= allowed else [f"largest error {error / allowed:.2f} x the bound"]
