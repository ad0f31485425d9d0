"""The class that a patched module gets: a subclass of its own, whose forward carries out a plan.

The class of an instance is changed, and nothing else. So the parameters, their names, hooks on the module, `isinstance`
and copies are what they were, and putting the class back undoes it. Pickles name the class below and the plan.
"""

from __future__ import annotations

import functools
import inspect
import logging
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from msformer_kernels.core.precision import autocast_enabled
from msformer_kernels.nn.honest import why_any_is_called
from msformer_kernels.patching.plain import Part, base_class, functions_of, why_changed
from msformer_kernels.patching.structures import Plan

_log = logging.getLogger("msformer_kernels.patch")


@dataclass(frozen=True)
class Proved:
    """A plan that was proved for a module."""

    plan: Plan
    parts: tuple[Part, ...]
    """What it relies on."""
    narrow: bool = True
    """Whether it holds under autocast and below float32, where a module may return another dtype."""

    @property
    def in_training(self) -> tuple[str, ...]:
        """Why the module's own forward runs in training; empty if the plan holds there too."""
        return tuple(dict.fromkeys(part.in_training for part in self.parts if part.in_training))


def plan_of(module: nn.Module) -> Plan | None:
    """The plan that a module carries out."""
    proved = getattr(type(module), "_msformer_proved", None)
    return None if proved is None else proved.plan


def put_in_place(module: nn.Module, proved: Proved) -> None:
    module.__class__ = patched_class(cast(Any, type(module)), proved)


def why_not_undone(module: nn.Module) -> str | None:
    """Why the class of a patched module cannot be put back; None if it can."""
    if base_class(module) is not type(module):
        return None
    return f"is a {type(module).__name__} now: something changed its class after it was patched (fully_shard does)"


def put_back(module: nn.Module) -> None:
    module.__class__ = base_class(module)


@functools.cache
def patched_class(base: Any, proved: Proved) -> type[nn.Module]:
    """The subclass of `base` that carries out a plan; the same one for the same arguments."""
    plan, parts = proved.plan, proved.parts
    functions = functions_of(part.base for part in parts)
    kinds = {helper.kind for part in parts for helper in part.helpers}
    functions += tuple((k, "__call__", k.__call__) for k in kinds if any("__call__" in vars(c) for c in k.__mro__))

    def forward(self: nn.Module, *given: Any, **named: Any) -> Any:
        if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
            why: str | None = "a graph for other programs is made"
        elif (call := plan.read(given, named)) is None:
            why = "it was called with other arguments"
        elif any(getattr(kind, name) is not known for kind, name, known in functions):
            why = "a function of its class, or of one inside, was replaced"
        elif (why := why_any_is_called()) is None:
            x = plan.tensor_of(call[0][0])
            autocast = autocast_enabled(x.device.type)
            why = why_changed(self, parts, None if autocast else x.dtype)
            if why is None and not proved.narrow and (autocast or x.dtype.itemsize < 4):
                why = "it does something else under autocast or below float32"
            if why is None:
                return plan.run(self, *call[0], **call[1])
        if not torch.compiler.is_compiling():
            _log.debug("%s runs its own forward: %s", base.__name__, why)
        return base.forward(self, *given, **named)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        made: Any = object.__reduce_ex__(self, max(protocol, 2))
        return (_rebuild, (base, proved, *made[1][1:]), *made[2:])

    def extra_repr(self: Any) -> str:
        return ", ".join(word for word in (base.extra_repr(self), f"msformer_kernels: {plan.title}") if word)

    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    forward.__wrapped__ = base.forward  # type: ignore[attr-defined]  # torch.fx takes the arguments from it
    namespace = {
        "forward": forward,
        "__reduce_ex__": reduce,
        "extra_repr": extra_repr,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_msformer_base": base,
        "_msformer_proved": proved,
    }
    found: Any = type(base.__name__, (base,), namespace)
    found._msformer_class = found
    return found


def _rebuild(base: type, proved: Proved, *arguments: Any) -> Any:
    kind = patched_class(base, proved)
    return kind.__new__(kind, *arguments)


def why_no_patched_class(base: type, proved: Proved) -> str | None:
    """Why the class that carries out a plan cannot be made, as for a class that refuses subclasses; None if it can."""
    try:
        patched_class(base, proved)
    except Exception as error:  # of a class that we know nothing of
        return f"a subclass of {base.__name__} cannot be made ({type(error).__name__}: {error})"
    return None


def why_no_subclass(module: nn.Module) -> str | None:
    """Why a module's class cannot have such a subclass; None if it can."""
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by torch.jit"
    if kind.__reduce_ex__ is not object.__reduce_ex__ or kind.__reduce__ is not object.__reduce__:
        return f"{kind.__name__} is pickled in a way of its own"
    return None
