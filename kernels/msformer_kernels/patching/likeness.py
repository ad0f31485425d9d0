"""Which modules share a proof: those between which a proof can see no difference.

A proof fills parameters and statistics with random numbers of its own, so their values do not count; all else does. A
module that holds what cannot be looked into is like no other one.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from msformer_kernels.patching.plain import OF_EVERY_MODULE, has_hooks

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_COMPARED_BY_VALUE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_THEMSELVES = (FunctionType, BuiltinFunctionType, type)


class _Same:
    """An object that is equal to itself alone. It is held, so that no other one gets its address."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def likeness(module: nn.Module) -> Hashable | None:
    """Equal for modules whose proofs are the same; None for one with hooks, or with buffers that are no statistics of a
    BatchNorm."""
    submodules, tensors = dict[int, int](), dict[int, int]()
    found: list[Hashable] = []
    for name, child in module.named_modules(remove_duplicate=False):
        if has_hooks(child):
            return None
        statistics = _STATISTICS if isinstance(child, _BatchNorm) else ()
        if any(n not in statistics and buffer is not None for n, buffer in child._buffers.items()):
            return None
        own = {n: value for n, value in vars(child).items() if n not in OF_EVERY_MODULE}
        found.append(
            (
                *(name, type(child), child.training, submodules.setdefault(id(child), len(submodules))),
                _state(own),
                tuple((n, _tensor(p, tensors)) for n, p in child._parameters.items()),
                tuple((n, _tensor(b, tensors)) for n, b in child._buffers.items()),
                tuple(n for n, inner in child._modules.items() if inner is None),
            )
        )
    return tuple(found)


def _tensor(tensor: Tensor | None, seen: dict[int, int]) -> Hashable:
    """All but the values, and which of the tensors it is, for one may have several names."""
    if tensor is None:
        return None
    if type(tensor) not in (Tensor, nn.Parameter):
        return _Same(tensor)
    facts = (type(tensor), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad)
    return (*facts, seen.setdefault(id(tensor), len(seen)), _state(getattr(tensor, "__dict__", {})))


def _state(value: Any, within: tuple[int, ...] = ()) -> Hashable:
    """Of plain values, of containers of them and of objects of a class written in Python; of others which one it is."""
    kind = type(value)
    if kind in _COMPARED_BY_VALUE:
        return (kind, repr(value))  # 1, 1.0 and True are equal
    if isinstance(value, _THEMSELVES) or id(value) in within:
        return _Same(value)
    within = (*within, id(value))
    if kind in (tuple, list):
        return (kind, tuple(_state(v, within) for v in value))
    if kind is dict:
        return (kind, tuple((_state(k, within), _state(v, within)) for k, v in value.items()))
    if kind is functools.partial and not vars(value):
        return (kind, *(_state(part, within) for part in (value.func, value.args, value.keywords)))
    if _is_of_python(kind):
        return (kind, _state(vars(value), within))
    return _Same(value)


def _is_of_python(kind: type) -> bool:
    """Whether all that an object holds is in its `__dict__`."""
    plain = kind.__new__ is object.__new__ and not issubclass(kind, (nn.Module, Tensor))
    return plain and kind is not object and not any("__slots__" in vars(c) for c in kind.__mro__)
