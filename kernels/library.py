"""What the operators share in their registration with `torch.library`.

Every operator is one op ``msformer::<name>`` with a ``backend`` argument, and one ``msformer::<name>_backward``; the
reference backend is plain PyTorch and does not pass through them. A dispatcher kernel looks the backend's module up in
a table and calls its `forward` or `backward`, so that a new backend is one more entry.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("msformer", "DEF")


class Implementations:
    """The modules that implement one operator, by backend; imported when first called."""

    def __init__(self, package: str, modules: dict[str, str]) -> None:
        self._package = package
        self._modules = modules
        self._loaded: dict[str, ModuleType] = {}

    def __getitem__(self, backend: str) -> ModuleType:
        module = self._loaded.get(backend)
        if module is None:
            if backend not in self._modules:
                known = ", ".join(self._modules)
                raise ValueError(f"backend: {self._package} has no kernels for {backend!r}, only for {known}")
            module = self._loaded[backend] = import_module(f"{self._package}.{self._modules[backend]}")
        return module


def register(
    name: str,
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
) -> None:
    """Defines ``msformer::<name>``, its kernel for every device and its fake kernel."""
    LIBRARY.define(f"{name}{schema}")
    LIBRARY.impl(name, _on_its_device(kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"msformer::{name}", fake, lib=LIBRARY)


def _on_its_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the GPU of the first argument the current one, for what a kernel launches and allocates."""

    def guarded(first: Tensor, *rest: Any) -> Any:
        if first.device.type != "cuda" or first.device.index == torch.cuda.current_device():
            return kernel(first, *rest)
        with torch.cuda.device(first.device):
            return kernel(first, *rest)

    return guarded


def register_autocast(name: str, rule: Callable[..., Any]) -> None:
    """`rule(op, dtype, *args)` is what a call does under autocast, where `op` calls below autocast."""
    op = getattr(torch.ops.msformer, name)
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def kernel(*args: Any, _device: str = device, _keys: torch._C.DispatchKeySet = keys) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(_keys):
                return rule(op, torch.get_autocast_dtype(_device), *args)

        LIBRARY.impl(name, kernel, key)


def refuse_second_derivative(name: str, operator: str) -> None:
    """Makes differentiating the op ``<name>``, itself a backward, an error that says what to do."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            f"{operator}: second derivatives are not supported by the compiled kernels; "
            'use backend="reference" (or use_backend("reference")), which is differentiable any number of times'
        )

    torch.library.register_autograd(f"msformer::{name}", backward, lib=LIBRARY)


def refuse_transforms(operator: str) -> None:
    """Raises where the compiled kernels would give silently wrong tangents, or PyTorch an error that says nothing.

    Forward-mode differentiation and the transforms of `torch.func` need more than a backward; the reference has it.
    """
    if torch.compiler.is_compiling():
        return
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            f"{operator}: forward-mode differentiation and torch.func are not supported by the compiled kernels; "
            'use backend="reference" (or use_backend("reference"))'
        )


def optional(gradient: Tensor, parameter: Tensor | None) -> Tensor | None:
    """The gradient of an optional parameter: ops cannot return None, so that of an absent one is a placeholder."""
    return None if parameter is None else gradient
