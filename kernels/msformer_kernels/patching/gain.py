"""How much faster a module is with a plan, at the sizes of an example: forward, and forward with backward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from msformer_kernels.patching.classes import Proved, put_in_place
from msformer_kernels.patching.conditions import deterministic
from msformer_kernels.patching.match import Match
from msformer_kernels.patching.plain import base_class
from msformer_kernels.patching.timing import medians

SAMPLES = 5


@dataclass(frozen=True)
class Gain:
    """Time of the original over that of the patched module, of the forward and of forward + backward."""

    forward: float
    backward: float

    @property
    def least(self) -> float:
        return min(self.forward, self.backward)

    def __str__(self) -> str:
        return f"{self.forward:.2f} x forward, {self.backward:.2f} x with backward"


Call = tuple[tuple[Any, ...], dict[str, Any]]


def measured(
    model: nn.Module, modules: dict[str, nn.Module], found: dict[str, Match], example: Sequence[Any]
) -> dict[str, Gain | None]:
    """The least gain of each module over the shapes that it gets; None for one that the example does not call."""
    known: dict[Any, Gain] = {}
    gains: dict[str, Gain | None] = {}
    with recorded(modules) as calls:
        run_example(model, example)
    for name, module in modules.items():
        here = []
        for call in calls[name]:
            # blocks that are alike are timed once
            key = (base_class(module), found[name].proved, signature(list(module.parameters())), signature(call))
            if key not in known:
                known[key] = measure(module, found[name].proved, call)
            here.append(known[key])
        gains[name] = min(here, key=lambda gain: gain.least, default=None)
    return gains


@contextmanager
def recorded(modules: dict[str, nn.Module]) -> Iterator[dict[str, list[Call]]]:
    """Within the block, the arguments of each call of these modules that is of a new shape, by name."""
    calls: dict[str, list[Call]] = {name: [] for name in modules}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            if all(signature(call) != signature((given, named)) for call in calls[name]):
                calls[name].append((_detached(given), _detached(named)))

        return keep

    handles = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def run_example(model: nn.Module, example: Sequence[Any]) -> None:
    """One forward in evaluation mode; modes and random numbers are put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), deterministic():
            model(*example)
    finally:
        for module, mode in modes:
            module.training = mode


def signature(value: Any) -> Any:
    """Shapes, strides and dtypes of the tensors in the arguments of a call, and the other values."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.stride(), value.dtype, value.device)
    if isinstance(value, (tuple, list)):
        return tuple(signature(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, signature(v)) for k, v in value.items())
    return value if isinstance(value, (bool, int, float, str)) else type(value)


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (tuple, list)):
        return type(value)(_detached(v) for v in value)
    return {k: _detached(v) for k, v in value.items()} if isinstance(value, dict) else value


def _with_gradients(value: Any) -> Any:
    """Tensors that ask for gradients, in lists or tuples as they are."""
    if isinstance(value, Tensor):
        return value.detach().requires_grad_()
    return type(value)(_with_gradients(v) for v in value)


def measure(module: nn.Module, proved: Proved, call: Call) -> Gain:
    """Of a module with one call's arguments, in evaluation mode; the two take turns."""
    rivals = [copy.deepcopy(module).eval() for _ in range(2)]
    for child in rivals[0].modules():
        child.__class__ = base_class(child)
    put_in_place(rivals[1], proved)
    given, named = call

    def forward(rival: nn.Module) -> Any:
        with torch.no_grad():
            return rival(*given, **named)

    def backward(rival: nn.Module) -> Any:
        output = rival(*(_with_gradients(given[:1])), *given[1:], **named)
        first = output[0] if isinstance(output, tuple) else output
        return first.backward(first.detach())

    with torch.inference_mode(False), torch.enable_grad():
        gains = []
        for run in (forward, backward):
            original, patched = medians(run, rivals, SAMPLES)
            gains.append(original / patched)
    return Gain(*gains)
