"""Activations as a person writes them: by name, or as PyTorch's module, its class, or its function."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from msformer_kernels.ops.mix_ffn.reference import ACTIVATIONS

_NAMES: dict[Any, str] = {
    nn.GELU: "gelu",
    F.gelu: "gelu",
    nn.ReLU: "relu",
    F.relu: "relu",
    torch.relu: "relu",
    nn.SiLU: "silu",
    F.silu: "silu",
    nn.Hardswish: "hardswish",
    F.hardswish: "hardswish",
    nn.ReLU6: "relu6",
    F.relu6: "relu6",
    nn.Identity: "identity",
}
Activation = str | nn.Module | Callable[..., Any]
"""A name, a module, its class or its function; of the latter two also a `functools.partial`."""


def activation_name(given: Activation, argument: str = "activation") -> str:
    """The name of an activation in `ACTIVATIONS`.

    Raises ValueError for anything that is none of those.
    """
    name = known_name(given)
    if name is None:
        names = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(
            f"{argument}: expected one of {names}, or the module, class or function of PyTorch that is one of them, "
            f"got {given!r}"
        )
    return name


def known_name(given: Any) -> str | None:
    """The name, or None for anything else. A module with hooks, a forward of its own or another class is something
    else."""
    if isinstance(given, str):
        return given if given in ACTIVATIONS else None
    if isinstance(given, nn.Module):
        touched = "forward" in vars(given) or given._forward_hooks or given._forward_pre_hooks or given._backward_hooks
        return None if touched else _with(type(given), getattr(given, "approximate", "none"))
    if isinstance(given, functools.partial):
        options = {"approximate": "none", **given.keywords}
        approximate = options.pop("approximate")
        return None if given.args or options.keys() - {"inplace"} else _with(given.func, approximate)
    return _with(given, "none")


def _with(kind: Any, approximate: str) -> str | None:
    name = _NAMES.get(kind) if isinstance(kind, Hashable) else None
    if approximate == "none":
        return name
    return "gelu_tanh" if name == "gelu" and approximate == "tanh" else None
