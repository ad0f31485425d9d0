"""Items that say whether results are right: accuracy, the same bits, CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

import msformer_kernels as kernels

from ..accuracy import MonteCarloArithmetic, Results, Rule, uncertainty
from .cases import GpuCase, set_tf32
from .items import Skip

DRAWS = 3
REPEATS = 4
TF32_EPS = 2.0**-10


def outputs_and_gradients(
    case: GpuCase,
    dtype: torch.dtype,
    x: Tensor,
    backend: str,
    seed: int,
    arithmetic: MonteCarloArithmetic | None = None,
) -> Results:
    """By name, in `dtype`; `arithmetic` makes rounding errors in x and the parameters.

    Raises Skip where the backend does not serve the call.
    """
    layer = case.layer().to(x.device, dtype)
    leaf = x.to(dtype)
    if arithmetic is not None:
        leaf = arithmetic.perturbed(leaf)
        for parameter in layer.parameters():
            parameter.data = arithmetic.perturbed(parameter.data)
    leaf = leaf.detach().requires_grad_()
    named = dict(layer.named_parameters()) if case.operation != "efficient_attention" else {}
    try:
        with kernels.use_backend(backend):
            outputs = case.run(layer, leaf)
            generator = torch.Generator().manual_seed(seed)
            # rounded to the dtype of the input, so that they are the same numbers for every dtype
            grads = [torch.randn(o.shape, generator=generator).to(x.dtype).to(o.device, o.dtype) for o in outputs]
            found = torch.autograd.grad(outputs, [leaf, *named.values()], grads, allow_unused=True)
    except kernels.BackendError as reason:
        raise Skip(str(reason)) from reason
    result = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return result | {f"grad {n}": g for n, g in zip(("x", *named), found, strict=True) if g is not None}


def random_tokens(case: GpuCase, seed: int, device: str) -> Tensor:
    shape, generator = case.shape, torch.Generator().manual_seed(seed)
    x = torch.randn(shape.batch, shape.height * shape.width, shape.dim, generator=generator)
    return x.to(device, case.storage)


def begin(content: dict[str, Any], backend: str) -> tuple[GpuCase, dict[str, Any]]:
    """The case, tf32 set for it, and the head of its row."""
    case = GpuCase.from_json(content)
    missing = case.check_backend(backend)
    set_tf32(case.dtype)
    row: dict[str, Any] = {"case": str(case), "dtype": case.dtype, "backend": backend}
    return case, row | ({"on another backend": missing} if missing else {})


@lru_cache(maxsize=DRAWS)
def _references(case: GpuCase, seed: int, device: str) -> tuple[Results, Results, Results]:
    """Eager's results, those in float64, and their uncertainty; kept for the next backend."""
    eps = TF32_EPS if case.dtype == "tf32" else torch.finfo(case.storage).eps
    x = random_tokens(case, seed, device)
    eager = outputs_and_gradients(case, case.storage, x, "reference", seed)
    exact = outputs_and_gradients(case, torch.float64, x, "reference", seed)
    perturbed = partial(outputs_and_gradients, case, torch.float64, x, "reference", seed)
    return eager, exact, uncertainty(perturbed, exact, eps)


def compare(case: dict[str, Any], backend: str, device: str, draws: int = DRAWS) -> dict[str, Any]:
    """The error rule of the tests: the error beside that of eager PyTorch in the same dtype, against float64."""
    what, row = begin(case, backend)
    rule = Rule()
    for seed in range(draws):
        x = random_tokens(what, seed, device)
        eager, exact, spread = _references(what, seed, device)
        ours = outputs_and_gradients(what, what.storage, x, backend, seed)
        rule.add({n: ours[n] for n in exact}, eager, exact, spread)
    ratio, worst = rule.worst
    errors = {name: c.ratio for name, c in rule.comparisons.items()}
    faults = rule.faults()
    return row | {"ok": not faults, "ratio": ratio, "worst": worst, "faults": faults, "errors": errors}


def repeat(case: dict[str, Any], backend: str, device: str, more: int = REPEATS) -> dict[str, Any]:
    """Whether every run gives the same bits, other work in between."""
    what, row = begin(case, backend)
    x = random_tokens(what, 0, device)
    first = outputs_and_gradients(what, what.storage, x, backend, 0)
    differ = set()
    for number in range(more):
        kept = torch.randn(1 << (10 + 2 * number), device=device).square()  # other addresses, another load
        again = outputs_and_gradients(what, what.storage, x, backend, 0)
        differ |= {name for name, value in first.items() if not torch.equal(value, again[name])}
        del kept
    return row | {"ok": not differ, "runs": 1 + more, "differ": sorted(differ)}


def captured(run: Callable[[], Any], warm_up: int = 3) -> tuple[torch.cuda.CUDAGraph, Any]:
    """`run` captured in a CUDA graph, and what it returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    return graph, found


def graph(case: dict[str, Any], backend: str, device: str) -> dict[str, Any]:
    """Whether a captured forward and backward gives the bits of the calls, also for new input."""
    what, row = begin(case, backend)
    layer = what.layer().to(device, what.storage)
    x = random_tokens(what, 0, device).requires_grad_()

    def step() -> list[Tensor]:
        with kernels.use_backend(backend):
            outputs = what.run(layer, x)
        loss = torch.stack([o.float().square().mean() for o in outputs]).sum()
        found = torch.autograd.grad(loss, [x, *layer.parameters()], allow_unused=True)
        return [*(o.detach() for o in outputs), *(g for g in found if g is not None)]

    replayed, results = captured(step)
    differ = 0
    for seed in (1, 2):
        with torch.no_grad():
            x.copy_(random_tokens(what, seed, device))
        replayed.replay()
        differ += sum(not torch.equal(a, b) for a, b in zip(results, step(), strict=True))
    return row | {"ok": not differ, "results that differ": differ}


def run_all(cases: list[dict[str, Any]], backend: str, device: str) -> list[dict[str, Any]]:
    """Forward and backward of each case once, for a tool that watches them; the results must be finite."""
    rows = []
    for content in cases:
        try:
            case, row = begin(content, backend)
            found = outputs_and_gradients(case, case.storage, random_tokens(case, 0, device), backend, 0)
        except Skip:
            continue
        bad = [name for name, value in found.items() if not value.isfinite().all()]
        rows.append(row | {"ok": not bad, "not finite": bad})
    if not rows:
        raise Skip(f"{backend} serves none of the cases")
    return rows
