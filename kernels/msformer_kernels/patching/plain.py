"""Whether a layer is the plain one that it seems to be, and whether it has changed since.

A patched module bypasses its submodules: an operator takes their parameters. That is right as long as each of them is
what it was when the plan was proved: of the same class, with the same settings, without hooks, and not replaced.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from msformer_kernels.patching.structures.common import SCALARS, joined

OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""What PyTorch itself keeps in a module."""

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
    """What a module holds that is no module and no setting: a function, a list, a configuration, or an object that it
    leaves its work to, as in diffusers."""

    name: str
    kind: type
    held: tuple[Any, ...]
    """A function itself; of a container its entries, of an object its attributes."""


@dataclass(frozen=True)
class Part:
    """A submodule as it was when the plan was proved; the path is empty for the module itself."""

    path: tuple[str, ...]
    base: type
    facts: tuple[tuple[str, Any], ...]
    fused: bool
    """Whether an operator takes its parameters and buffers."""
    helpers: tuple[Helper, ...] = ()
    tensors: tuple[str, ...] = ()
    """The parameters and buffers that were there."""
    inner: int = 0
    """How many submodules it had."""
    attributes: int = 0
    """How many attributes it had."""
    names: frozenset[str] = frozenset()
    """Those of them that its forward might read."""
    reads: frozenset[str] = frozenset()
    """What its forward reads, whether it is there or not."""
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
        names = tuple(n for n, v in _attributes(module).items() if _is_setting(v))
    helpers = tuple(Helper(n, type(v), held(v)) for n, v in _helpers(module).items())
    facts = tuple((n, getattr(module, n)) for n in names)
    reads = _read_by(base)
    own = frozenset(n for n in vars(module) if _may_be_read(n, base, reads))
    return Part(
        *(path, base, facts, fused, helpers, _tensors(module), len(module._modules), len(vars(module)), own, reads),
        in_training=in_training,
    )


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a module holds besides what every module does, and what its class holds for it that its functions read."""
    base = base_class(module)
    of_class = {n for c in _classes(base) for n in vars(c) if n in _read_by(base)}
    return {
        n: getattr(module, n)
        for n in (*(n for n in vars(module) if n not in OF_EVERY_MODULE), *sorted(of_class - vars(module).keys()))
        if n in vars(module) or _is_setting(getattr(base, n)) or isinstance(getattr(base, n), _CONTAINERS)
    }


def _helpers(module: nn.Module) -> dict[str, Any]:
    """Attributes that are neither modules nor settings, by name."""
    if base_class(module) in _FACTS:
        return {}
    return {n: v for n, v in _attributes(module).items() if not isinstance(v, nn.Module) and not _is_setting(v)}


def _tensors(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters and buffers that a module has."""
    found = tuple([n for n, p in module._parameters.items() if p is not None]) if module._parameters else ()
    return (*found, *(n for n, b in module._buffers.items() if b is not None)) if module._buffers else found


def _classes(base: type) -> list[type]:
    """A class and those that it is made of, but those that all modules are made of."""
    return [c for c in base.__mro__ if c not in nn.Module.__mro__]


@functools.cache
def _read_by(base: type) -> frozenset[str]:
    """Names that the forward of a class may read, and the functions of the class that it calls."""
    names, todo = set[str](), ["forward"]
    while todo:
        name = todo.pop()
        for function in (vars(c)[name] for c in _classes(base) if name in vars(c)):
            function = getattr(function, "fget", getattr(function, "__func__", function))
            new = _names_in(getattr(function, "__code__", None)) - names
            names |= new
            todo += new
    return frozenset(n for n in {"forward", *names} if n.isidentifier())


def _names_in(code: CodeType | None) -> set[str]:
    """Also those that it hands to `getattr`."""
    if code is None:
        return set()
    inner = [_names_in(c) for c in code.co_consts if isinstance(c, CodeType)]
    return {*code.co_names, *(c for c in code.co_consts if isinstance(c, str))}.union(*inner)


def _may_be_read(name: str, base: type, reads: frozenset[str]) -> bool:
    """Whether a forward might read an attribute of this name; tools keep what is theirs under names with a line before
    them."""
    if name in OF_EVERY_MODULE or name == "forward":
        return False
    return name in reads if hasattr(base, name) else name[0] != "_"


def functions_of(bases: Iterable[type]) -> tuple[tuple[type, str, Any], ...]:
    """The functions that the forwards of these classes run: class, name, and what it is now."""
    found = {
        (c, name): getattr(c, name)
        for base in bases
        for c in _classes(base)
        for name in vars(c).keys() & _read_by(base)
    }
    return tuple((*key, f) for key, f in found.items() if isinstance(f, (FunctionType, property)))


def held(value: Any) -> tuple[Any, ...]:
    """What is in a container or an object, as far as it can be compared."""
    if isinstance(value, (*_FUNCTIONS, type)):
        return (value,)
    if isinstance(value, functools.partial):
        return (value.func, value.args, tuple(value.keywords.items()))
    if isinstance(value, _CONTAINERS):
        return _entries(value)
    return tuple([(n, _entries(v)) for n, v in getattr(value, "__dict__", {}).items()])


def _entries(value: Any) -> Any:
    """Containers as tuples, what is inside as well."""
    if isinstance(value, dict):
        return tuple([(k, _entries(v)) for k, v in value.items()])
    if isinstance(value, (set, frozenset)):
        return frozenset(value)
    return tuple([_entries(v) for v in value]) if isinstance(value, (list, tuple)) else value


_CONTAINERS = (list, tuple, dict, set, frozenset)
_FUNCTIONS = (FunctionType, BuiltinFunctionType)


def why_not_followed(name: str, module: nn.Module) -> str | None:
    """Why a change of what a module holds might not be seen; None if it would be."""
    for helper, value in _helpers(module).items():
        plain = (*_FUNCTIONS, functools.partial, type, *_CONTAINERS)
        if isinstance(value, torch.Tensor):
            return f"{joined(name, helper)} is a {type(value).__name__}, whose changes would not be seen"
        if not isinstance(value, plain) and (
            type(value).__new__ is not object.__new__ or not hasattr(value, "__dict__")
        ):
            return f"{joined(name, helper)} is a {type(value).__name__}, which may hold anything"
        unknown = next((v for v in _flat(held(value)) if not isinstance(v, (*_VALUES, *_FUNCTIONS, type))), None)
        if unknown is not None:
            return f"{joined(name, helper)} holds a {type(unknown).__name__}, whose changes would not be seen"
    return None


_VALUES = (*SCALARS, complex, bytes, torch.dtype, torch.device)


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        yield from _flat(value) if isinstance(value, (tuple, frozenset)) else (value,)


def _is_setting(value: Any) -> bool:
    return all(_is_setting(v) for v in value) if isinstance(value, tuple) else isinstance(value, _VALUES)


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
                    layout = "" if tensor.layout is torch.strided else f" of layout {tensor.layout}"
                    return f"{name} has a {kind} that is a {type(tensor).__name__}{layout}"
    return None


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or getattr(module, "_backward_pre_hooks", None)
    )


def _is_plain_tensor(tensor: torch.Tensor) -> bool:
    """A tensor, a parameter, or what stands for one while a graph is made; not a subclass, and not a sparse one."""
    kind = type(tensor)
    return tensor.layout is torch.strided and (
        kind is nn.Parameter or kind is torch.Tensor or kind.__module__ in _OF_GRAPHS
    )


_OF_GRAPHS = ("torch._subclasses.fake_tensor", "torch._subclasses.functional_tensor")


def why_changed(module: nn.Module, parts: tuple[Part, ...], dtype: torch.dtype | None) -> str | None:
    """What has changed in a module since its plan was proved, so that its own forward must run; None if nothing has.

    `dtype` is that of the parameters which the plan takes; None for any.
    """
    for found in parts:
        child: Any = module
        for name in found.path:
            child = child._modules.get(name)
            if child is None:
                return f"{'.'.join(found.path)} is gone"
        if found.in_training and child.training:
            return f"{found.in_training} in training"
        if found.path:
            if type(child) is not found.base and base_class(child) is not found.base:
                return f"{'.'.join(found.path)} is a {type(child).__name__} now"
            touched = why_touched(".".join(found.path), child, found.fused)
            if touched is not None:
                return touched
        if len(child._modules) != found.inner:
            return f"{'.'.join(found.path) or 'it'} has {len(child._modules)} submodules now, it had {found.inner}"
        if torch.compiler.is_compiling():
            _guard(child, found)
        if len(child.__dict__) != found.attributes and (new := _new_attribute(child, found)) is not None:
            return f"{'.'.join((*found.path, new))} is new"
        if _tensors(child) != found.tensors and set(_tensors(child)) != set(found.tensors):
            return f"{'.'.join(found.path) or 'it'} has other parameters or buffers now"
        if dtype is not None and found.tensors and not isinstance(child, _BatchNorm):
            for tensor in child._parameters.values():
                if tensor is not None and tensor.dtype != dtype:
                    return f"{'.'.join(found.path) or 'it'} is {tensor.dtype}, its input {dtype}"
        for name, value in found.facts:
            if getattr(child, name, None) != value:
                return f"{'.'.join((*found.path, name))} was changed"
        for helper in found.helpers:
            now = getattr(child, helper.name, None)
            if type(now) is not helper.kind:
                return f"{'.'.join((*found.path, helper.name))} is of another class now"
            if held(now) != helper.held:
                return f"{'.'.join((*found.path, helper.name))} was changed"
    return None


def _new_attribute(module: nn.Module, found: Part) -> str | None:
    """An attribute that its forward might read, and that it had not."""
    new = [n for n in vars(module) if n not in found.names and _may_be_read(n, found.base, found.reads)]
    return new[0] if new else None


def _guard(module: Any, found: Part) -> None:
    """Has torch.compile guard what a module's forward may read; it guards no entries of a `__dict__`."""
    of_torch = found.base.__module__.startswith("torch.")
    for name in found.reads:
        if hasattr(found.base, name) if of_torch else name not in OF_EVERY_MODULE:
            getattr(module, name, None)
