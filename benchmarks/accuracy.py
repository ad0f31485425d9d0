"""The error rule: is a kernel as accurate as eager PyTorch in the same dtype? Used by the tests and the GPU check.

Over several draws of random inputs, each output and gradient is compared with the float64 reference on the same rounded
inputs. Errors are measured in units of what rounding to the dtype costs in that draw, the `uncertainty`: the spread of
the float64 reference under Monte Carlo arithmetic (Parker, "Monte Carlo Arithmetic", 1997), where every input and every
result of an operation is off by up to half a unit in the last place of the dtype. So a draw that cancels to nearly
nothing, where both are far off, does not outweigh the others. Two things must hold:

- the RMS over draws and elements is at most `RATIO` times eager's; a sampling error, `SAMPLING` over the square root
  of the number of values, is allowed for;
- no single value is off by more than `BOUND` times the largest uncertainty of its tensor, or eager's largest error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Results = dict[str, Tensor]
"""Outputs and gradients by name."""

RATIO = 1.25
SAMPLING = 2.0
BOUND = 6.0
SAMPLES = 5
"""Runs of the reference under Monte Carlo arithmetic, for each draw."""
ONE_ROUNDING = 0.3
"""The RMS error, in units of eps, of a value that is rounded once; measured on nothing smaller than that."""


class MonteCarloArithmetic(TorchDispatchMode):
    """Within it every floating-point result of an operation is off by a random relative error of up to eps / 2."""

    def __init__(self, eps: float, seed: int) -> None:
        super().__init__()
        self.eps, self.seed = eps, seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if any(result.alias_info is not None for result in func._schema.returns):
            return found  # a view, or written in place
        return torch.utils._pytree.tree_map_only(Tensor, self.perturbed, found)

    def perturbed(self, x: Tensor) -> Tensor:
        """x with random errors; nothing but floating-point values has any."""
        if not x.is_floating_point():
            return x
        if x.device not in self.generators:
            self.generators[x.device] = torch.Generator(x.device).manual_seed(self.seed)
        noise = torch.rand(x.shape, generator=self.generators[x.device], dtype=x.dtype, device=x.device)
        return x * (1 + self.eps * (noise - 0.5))


def uncertainty(run: Callable[[MonteCarloArithmetic], Results], exact: Results, eps: float) -> dict[str, Tensor]:
    """By name, how far each value of the reference is off at most. `run` gets the arithmetic, to perturb its inputs."""
    largest = {name: torch.zeros_like(value) for name, value in exact.items()}
    for seed in range(SAMPLES):
        arithmetic = MonteCarloArithmetic(eps, seed)
        with arithmetic:
            found = run(arithmetic)
        for name, value in exact.items():
            largest[name] = torch.maximum(largest[name], (found[name] - value).abs())
    return largest


@dataclass
class Comparison:
    """Our errors and eager's, of one output or gradient over all draws, in units of its uncertainty."""

    values: int = 0
    ours: float = 0.0
    eager: float = 0.0
    worst: float = 0.0
    """Our largest error, over the largest that the bound allows."""

    def add(self, found: Tensor, eager: Tensor, exact: Tensor, spread: Tensor) -> None:
        """One draw."""
        eps = torch.finfo(found.dtype).eps
        one_rounding = ONE_ROUNDING * eps * _rms(exact)
        scale = math.hypot(_rms(spread), one_rounding, _rms(eager.double() - exact)) or torch.finfo(found.dtype).tiny
        error = (found.double() - exact) / scale
        self.values += exact.numel()
        self.ours += error.square().sum().item()
        self.eager += ((eager.double() - exact) / scale).square().sum().item()
        self.eager += exact.numel() * (one_rounding / scale) ** 2
        largest = max(spread.max().item(), eps * exact.abs().max().item(), (eager.double() - exact).abs().max().item())
        worst = (found.double() - exact).abs().max().item() / (BOUND * largest or 1.0)
        self.worst = worst if math.isnan(worst) else max(self.worst, worst)

    @property
    def ratio(self) -> float:
        """Our RMS error over eager's; NaN where ours is."""
        return math.sqrt(self.ours / self.eager) if self.eager else math.inf if self.ours else 0.0

    @property
    def allowed(self) -> float:
        return RATIO + SAMPLING / math.sqrt(self.values)


@dataclass
class Rule:
    """The error rule for one case: the comparison of each output and gradient, by name."""

    comparisons: dict[str, Comparison] = field(default_factory=dict)
    draws: int = 0

    def add(self, ours: Results, eager: Results, exact: Results, spread: dict[str, Tensor]) -> None:
        """One draw. Raises ValueError for results that are missing, or of another dtype or shape."""
        self.draws += 1
        if ours.keys() != exact.keys():
            raise ValueError(f"results: expected {', '.join(exact)}, got {', '.join(ours)}")
        for name, value in exact.items():
            found = ours[name]
            if (found.dtype, found.shape) != (eager[name].dtype, value.shape):
                wanted = f"{eager[name].dtype} {tuple(value.shape)}"
                raise ValueError(f"{name}: expected {wanted}, got {found.dtype} {tuple(found.shape)}")
            if value.numel():
                self.comparisons.setdefault(name, Comparison()).add(found, eager[name], value, spread[name])

    def faults(self) -> list[str]:
        """What breaks the rule."""
        found = []
        for name, c in self.comparisons.items():
            if not c.ratio <= c.allowed:  # NaN is not
                found.append(f"{name}: RMS error {c.ratio:.2f} x eager's, {c.allowed:.2f} allowed")
            if not c.worst <= 1:
                found.append(f"{name}: largest error {c.worst:.2f} x the bound")
        return found

    @property
    def worst(self) -> tuple[float, str]:
        """The largest ratio of errors, and the name it belongs to."""
        return max(((c.ratio, name) for name, c in self.comparisons.items()), default=(0.0, ""))


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()
