"""What a module's forward runs under while it is proved: plain tensors on the CPU, and random numbers from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as modules
from torch.overrides import TorchFunctionMode


@contextmanager
def plain_mode() -> Iterator[None]:
    """Gradients, no autocast, tensors on the CPU, nothing rounded to float32, whatever is set around."""
    with plain_tensors(), torch.enable_grad(), torch.autocast("cpu", enabled=False), _StaysWide():
        yield


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Tensors on the CPU that are differentiable later, and no hooks for all modules."""
    kept = [(hooks, hooks.copy()) for hooks in _GLOBAL_HOOKS]
    for hooks, _ in kept:
        hooks.clear()
    try:
        with torch.inference_mode(False), torch.device("cpu"):
            yield
    finally:
        for hooks, entries in kept:
            hooks.update(entries)


_GLOBAL_HOOKS: tuple[dict[int, Any], ...] = (
    modules._global_forward_hooks,
    modules._global_forward_pre_hooks,
    modules._global_backward_hooks,
    modules._global_backward_pre_hooks,
)


class _StaysWide(TorchFunctionMode):
    """Conversions of float64 to float32 keep float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func in _CONVERSIONS and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = [torch.float64 if value is torch.float32 else value for value in args]
            named = {n: torch.float64 if value is torch.float32 else value for n, value in named.items()}
        return func(*args, **named)


_CONVERSIONS = (Tensor.float, Tensor.to, Tensor.type)
"""Ways to another dtype that a forward takes."""


Drawn = Hashable
"""Where drawing random numbers left PyTorch's and Python's generators; None if none were drawn."""


@contextmanager
def deterministic() -> Iterator[Callable[[], Drawn]]:
    """Seeds PyTorch's and Python's random numbers, and puts their states back; the value tells what was drawn so
    far."""
    of_python = random.getstate()

    def state() -> Hashable:
        return torch.get_rng_state().numpy().tobytes(), random.getstate()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        random.seed(2)
        before = state()
        try:
            yield lambda: None if state() == before else state()
        finally:
            random.setstate(of_python)
