"""The reference as an implementation of the op: for graphs that have no backend in them and run where there is none,
and, differentiable any number of times, for the derivatives that no kernel has.

Eager calls of the backend ``reference`` do not come here: they run the reference as it is.
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
        """All outputs of the op, not differentiable."""
        with torch.no_grad():
            return self.differentiable_forward(call)

    def differentiable_forward(self, call: Any) -> Any:
        """What only the backward of another backend needs is NaN: no gradients are better than wrong ones."""
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

    def differentiable_backward(self, call: Any, grads: Any) -> dict[str, Tensor]:
        """`backward` as a function of all its tensors that can be differentiated again; by name, without the absent.

        `grads` has the gradients of `Operator.outputs`, by name; None is zero.
        """
        present = self._present(call)
        given = [getattr(grads, name) for name in self.operator.outputs]

        def outputs(*tensors: Tensor) -> list[Tensor]:
            found = self._run(call._replace(**dict(zip(present, tensors, strict=True))))
            return [o for o, g in zip(found, given, strict=False) if g is not None]

        pull_back = torch.func.vjp(outputs, *(getattr(call, name) for name in present))[1]
        return dict(zip(present, pull_back([g for g in given if g is not None]), strict=True))

    def second_backward(
        self, call: Any, grads: Any, of_gradients: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gradients of `call` and `grads`, by name, for those of the gradients that `backward` returned; likewise
        differentiable."""
        of_call = self._present(call)
        of_grads = [name for name in self.operator.outputs if getattr(grads, name) is not None]

        def gradients(*tensors: Tensor) -> dict[str, Tensor]:
            count = len(of_call)
            found = self.differentiable_backward(
                call._replace(**dict(zip(of_call, tensors[:count], strict=True))),
                grads._replace(**dict(zip(of_grads, tensors[count:], strict=True))),
            )
            return {name: found[name] for name in of_gradients}

        tensors = [getattr(call, name) for name in of_call] + [getattr(grads, name) for name in of_grads]
        found = torch.func.vjp(gradients, *tensors)[1](of_gradients)
        count = len(of_call)
        return dict(zip(of_call, found[:count], strict=True)), dict(zip(of_grads, found[count:], strict=True))

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
