"""The reference as an implementation of the op, for graphs that have no backend in them and run where there is none.

Eager calls do not come here: they run the reference as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from msformer_kernels.core.layout import placed_like, room_like
from msformer_kernels.core.precision import arithmetic_dtype

if TYPE_CHECKING:
    from msformer_kernels.core.operator import Operator


def _autograd() -> Any:
    """Within it operations are differentiated, although a kernel of an op runs below autograd."""
    keys = torch._C.DispatchKey
    below = torch._C.DispatchKeySet(keys.AutogradFunctionality) | torch._C.DispatchKeySet(keys.ADInplaceOrView)
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    return torch._C._ForceDispatchKeyGuard(included, excluded - below)


class Reference:
    """`forward` and `backward` of one operator, by its reference and autograd."""

    def __init__(self, operator: Operator[Any]) -> None:
        self.operator = operator

    def forward(self, call: Any) -> Any:
        """What only the backward of another backend needs is NaN: no gradients are better than wrong ones."""
        with torch.no_grad():
            outputs = self._run(call)
        room = self.operator.fake(call)
        placed = [placed_like(x, r) for x, r in zip(outputs, room, strict=False)]
        placed += [x.fill_(float("nan")) for x in room[len(outputs) :]]
        return tuple(placed) if len(placed) > 1 else placed[0]

    def backward(self, call: Any, saved: Any, grads: Any) -> tuple[Tensor, ...]:
        operator = self.operator
        with _autograd(), torch.enable_grad():
            leaves = {n: getattr(call, n).detach().requires_grad_() for n in self._present(call)}
            outputs = self._run(call._replace(**leaves))
            pairs = [(o, g) for o, g in zip(outputs, grads, strict=False) if g is not None]
            gradients = torch.autograd.grad([o for o, _ in pairs], list(leaves.values()), [g for _, g in pairs])
        place = (lambda g, x: placed_like(g, room_like(x))) if operator.keeps_layout else lambda g, x: g.contiguous()
        by_name = {name: place(g, leaves[name]) for name, g in zip(leaves, gradients, strict=True)}
        for name in operator.skippable:
            if not getattr(grads, f"{name}_wanted"):
                by_name.pop(name)
        wide = arithmetic_dtype(call[0].dtype)
        return tuple(
            by_name[name]
            if name in by_name
            else call[0].new_empty(0, dtype=wide if getattr(call, name) is None else None)
            for name in operator.differentiable
        )

    def _present(self, call: Any) -> list[str]:
        return [name for name in self.operator.differentiable if getattr(call, name) is not None]

    def _run(self, call: Any) -> tuple[Tensor, ...]:
        """The reference's outputs, the first in the dtype of the op.

        A call mixes dtypes under autocast, or where the operator has wide parameters. If the activations are the
        narrow ones, autocast to their dtype is what they come from, and it leaves wide what the eager reference does.
        """
        dtype = call[0].dtype
        tensors = {n: getattr(call, n) for n in self.operator.tensors}
        other = {n: t for n, t in tensors.items() if t is not None and t.is_floating_point() and t.dtype != dtype}
        if other and dtype in (torch.bfloat16, torch.float16):
            with torch.autocast(call[0].device.type, dtype, cache_enabled=False):
                found = self.operator.run_reference(call)
        else:
            found = self.operator.run_reference(call._replace(**{n: t.to(dtype) for n, t in other.items()}))
        first, *others = found if isinstance(found, tuple) else (found,)
        return first.to(dtype), *others
