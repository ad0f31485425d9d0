"""How an op is differentiated: its kernel for PyTorch's Autograd key.

`torch.library.register_autograd` does the same, but asks the schema for its arguments once for each of them in every
differentiable call, which costs an op of twenty arguments some 50 us of host time. Ops here have no arguments with
defaults, so there is nothing to ask for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._functorch.utils import enable_single_level_autograd_function

from msformer_kernels.core.transforms import in_forward_mode


def register_autograd(
    library: torch.library.Library,
    name: str,
    keep: Callable[[Any, tuple[Any, ...], Any], None],
    differentiate: Callable[..., tuple[Any, ...]],
    instead: Callable[..., Any],
) -> None:
    """Makes the op `name` of a library differentiable, also under the transforms of `torch.func`.

    ``keep(ctx, arguments, outputs)`` saves what ``differentiate(ctx, *gradients)`` needs, which returns a gradient or
    None for each argument, as `forward` and `backward` of a `torch.autograd.Function` do. In forward mode
    ``instead(*arguments)`` is called, which must be made of ops that have it.
    """
    op = getattr(getattr(torch.ops, library.ns), name).default

    def below(keys: torch._C.DispatchKeySet, arguments: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

    def forward(ctx: Any, keys: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        # a Function turns gradients off, here for this transform; whether those around it have them they know
        with torch.set_grad_enabled(torch._C._are_functorch_transforms_active()):
            outputs = below(keys, arguments)
        keep(ctx, arguments, outputs)
        return outputs

    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        return None, *differentiate(ctx, *gradients)

    function: Any = type(
        f"{library.ns}_{name}",
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )
    # under transforms the dispatcher comes here once a level; Function.apply would do levels itself, by other rules
    apply_once = super(torch.autograd.Function, function).apply

    def kernel(keys: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        if in_forward_mode():
            return instead(*arguments)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)):
            return below(keys, arguments)
        if not torch._C._are_functorch_transforms_active():
            return function.apply(keys, *arguments)
        with enable_single_level_autograd_function():
            return apply_once(keys, *arguments)

    library.impl(name, kernel, "Autograd", with_keyset=True)
