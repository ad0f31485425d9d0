"""Whether a layer is the plain one that it seems to be, and whether it has changed since.

A patched module bypasses its submodules: an operator takes their parameters. That is right as long as each of them is
what it was when the plan was proved: of the same class, with the same settings, without hooks, and not replaced.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from msformer_kernels.patching.structures.common import SCALARS, joined

_FACTS: dict[type, tuple[str, ...]] = {
    nn.Linear: (),
    nn.Conv2d: ("stride", "padding", "dilation", "groups", "padding_mode"),
    nn.LayerNorm: ("eps",),
    nn.BatchNorm1d: ("eps",),
    nn.BatchNorm2d: ("eps",),
    nn.SyncBatchNorm: ("eps",),
    nn.Dropout: ("p", "inplace"),
    nn.GELU: ("approximate",),
    nn.Identity: (),
    nn.Sequential: (),
}
"""What of PyTorch's own layers may be changed after they were made."""
_PLAIN: dict[type[nn.Module], nn.Module] = {
    nn.Linear: nn.Linear(1, 1),
    nn.Conv2d: nn.Conv2d(1, 1, 1),
    nn.LayerNorm: nn.LayerNorm(1),
    _BatchNorm: nn.SyncBatchNorm(1),
}
"""An example of each kind of layer whose parameters an operator may take: it shows what such a layer has."""


@dataclass(frozen=True)
class Helper:
    """What a module may leave its work to that is no module: a function, or an object, as in diffusers."""

    name: str
    kind: type
    held: tuple[Any, ...]
    """A function itself; of an object its attributes."""


@dataclass(frozen=True)
class Part:
    """A submodule as it was when the plan was proved; the path is empty for the module itself."""

    path: tuple[str, ...]
    base: type
    facts: tuple[tuple[str, Any], ...]
    fused: bool
    """Whether an operator takes its parameters and buffers."""
    helpers: tuple[Helper, ...] = ()
    buffers: tuple[str, ...] = ()
    """Those of an operator's that were there."""
    inner: int = 0
    """How many submodules it had."""
    in_training: str = ""
    """Why its own forward must run while it is in training mode; empty if it need not."""


def base_class(module: nn.Module) -> type:
    """The class of a module, without the one that a patch has put in place."""
    kind = type(module)
    # a class made of the patched one, by fully_shard or a parametrization, inherits its attributes
    return kind._msformer_base if getattr(kind, "_msformer_class", None) is kind else kind


def part(path: tuple[str, ...], module: nn.Module, fused: bool, in_training: str) -> Part:
    base = base_class(module)
    names = _FACTS.get(base)
    if names is None:
        names = tuple(n for n, v in vars(module).items() if n != "training" and n[0] != "_" and _is_setting(v))
    helpers = tuple(Helper(n, type(v), _held(v)) for n, v in _helpers(module).items())
    buffers = tuple(n for n, tensor in module._buffers.items() if tensor is not None) if fused else ()
    facts = tuple((n, getattr(module, n)) for n in names)
    return Part(path, base, facts, fused, helpers, buffers, len(module._modules), in_training)


def _helpers(module: nn.Module) -> dict[str, Any]:
    """Attributes that can be called and are neither modules nor classes, by name."""
    if base_class(module) in _FACTS:
        return {}
    return {n: v for n, v in vars(module).items() if callable(v) and not isinstance(v, (nn.Module, type))}


def _held(helper: Any) -> tuple[Any, ...]:
    if isinstance(helper, _FUNCTIONS):
        return (helper,)
    if isinstance(helper, functools.partial):
        return (helper.func, helper.args, tuple(helper.keywords.items()))
    return tuple(getattr(helper, "__dict__", {}).items())


_FUNCTIONS = (FunctionType, BuiltinFunctionType)


def why_not_followed(name: str, module: nn.Module) -> str | None:
    """Why a change of what a module leaves its work to might not be seen; None if it would be."""
    for helper, value in _helpers(module).items():
        plain = (*_FUNCTIONS, functools.partial)
        if not isinstance(value, plain) and (
            type(value).__new__ is not object.__new__ or not hasattr(value, "__dict__")
        ):
            return f"{joined(name, helper)} is a {type(value).__name__}, which may hold anything"
        unknown = next((v for v in _flat(_held(value)) if not isinstance(v, (*SCALARS, *_FUNCTIONS, type))), None)
        if unknown is not None:
            return f"{joined(name, helper)} holds a {type(unknown).__name__}, whose changes would not be seen"
    return None


def _flat(values: tuple[Any, ...]) -> Iterable[Any]:
    for value in values:
        yield from _flat(value) if isinstance(value, tuple) else (value,)


def _is_setting(value: Any) -> bool:
    return all(_is_setting(v) for v in value) if isinstance(value, tuple) else isinstance(value, SCALARS)


def why_not_plain(name: str, layer: nn.Module) -> str | None:
    """Why an operator cannot take a layer's parameters in place of a call; None if it can."""
    touched = why_touched(name, layer, True)
    if touched is not None:
        return touched
    kind = next((k for k in _PLAIN if isinstance(layer, k)), None)
    if kind is None or _has_more(layer, _PLAIN[kind]):
        return f"{name} is a {type(layer).__name__}, which has more than a weight and a bias"
    for attribute in vars(layer).keys() - vars(_PLAIN[kind]).keys():
        # None is a place for what comes later, as an adapter
        if vars(layer)[attribute] is None or not _is_setting(vars(layer)[attribute]):
            return f"{name} is a {type(layer).__name__} with {attribute}, which a {kind.__name__} has not"
    return None


def _has_more(layer: nn.Module, example: nn.Module) -> bool:
    """Parameters, buffers or submodules that no layer of the kind has. The BatchNorms of timm hold an activation and a
    dropout, which are watched like any other submodule."""
    inner: Iterable[object] = layer.children()
    if isinstance(layer, _BatchNorm):
        inner = (t for child in layer.children() for t in (*child.parameters(), *child.buffers()))
    return bool(
        layer._parameters.keys() - example._parameters.keys()
        or layer._buffers.keys() - example._buffers.keys()
        or any(True for _ in inner)
    )


def why_touched(name: str, module: nn.Module, fused: bool) -> str | None:
    """Why a submodule must be called, whatever its class; None if it need not be."""
    if has_hooks(module):
        return f"{name} has hooks"
    if "forward" in module.__dict__:
        return f"{name} has another patch: a forward of its own"
    if fused:
        for kind, tensors in (("parameter", module._parameters), ("buffer", module._buffers)):
            for tensor in tensors.values():
                if tensor is not None and not _is_plain_tensor(tensor):
                    return f"{name} has a {kind} that is a {type(tensor).__name__}"
    return None


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or getattr(module, "_backward_pre_hooks", None)
    )


def _is_plain_tensor(tensor: torch.Tensor) -> bool:
    """A tensor, a parameter, or what stands for one while a graph is made; not a subclass with a layout of its own."""
    kind = type(tensor)
    return kind is nn.Parameter or kind is torch.Tensor or kind.__module__ in _OF_GRAPHS


_OF_GRAPHS = ("torch._subclasses.fake_tensor", "torch._subclasses.functional_tensor")


def why_changed(module: nn.Module, parts: tuple[Part, ...]) -> str | None:
    """What has changed in a module since its plan was proved, so that its own forward must run; None if nothing has."""
    for found in parts:
        child: Any = module
        for name in found.path:
            child = child._modules.get(name)
            if child is None:
                return f"{'.'.join(found.path)} is gone"
        if found.in_training and child.training:
            return f"{found.in_training} in training"
        if found.path:
            if base_class(child) is not found.base:
                return f"{'.'.join(found.path)} is a {type(child).__name__} now"
            touched = why_touched(".".join(found.path), child, found.fused)
            if touched is not None:
                return touched
        if len(child._modules) != found.inner:
            return f"{'.'.join(found.path) or 'it'} has {len(child._modules)} submodules now, it had {found.inner}"
        for name in found.buffers:
            if child._buffers.get(name) is None:
                return f"{'.'.join((*found.path, name))} is gone"
        for name, value in found.facts:
            if getattr(child, name, None) != value:
                return f"{'.'.join((*found.path, name))} was changed"
        for helper in found.helpers:
            now = getattr(child, helper.name, None)
            if type(now) is not helper.kind:
                return f"{'.'.join((*found.path, helper.name))} is of another class now"
            if _held(now) != helper.held:
                return f"{'.'.join((*found.path, helper.name))} was changed"
    return None
