"""What the transforms of PyTorch do with an op, whatever its backend.

- `torch.func.vmap`: one call of the op for all slices, as a larger batch, where it works on every image by itself and
  all slices share its parameters; else one call a slice. Either way it keeps its backend.
- Forward mode, and derivatives of a backward: the reference, which is differentiable any number of times.

The logger ``msformer_kernels`` says on level DEBUG where a call is not one call of its backend, and why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

logger = logging.getLogger("msformer_kernels")
Batched = Callable[[Sequence[Any], Sequence["int | None"]], "Sequence[int] | None"]


def in_forward_mode() -> bool:
    """Whether there may be tangents, of `torch.autograd.forward_ad` or of `torch.func`."""
    return forward_ad._current_level >= 0


def is_wrapper(value: Any) -> bool:
    """Whether a value is a tensor made of other tensors, such as a DTensor, which kernels cannot read."""
    return isinstance(value, Tensor) and is_traceable_wrapper_subclass(value)


def register_vmap(library: torch.library.Library, name: str, batched: Batched) -> None:
    """Gives the op `name` of a library its rule for `torch.func.vmap`.

    ``batched(arguments, in_dims)`` returns the positions of the tensors whose first dimension is the batch, if slices
    may be one call: then all others are shared, and every output has the batch as its first dimension. It returns None
    if they may not.
    """
    op = getattr(getattr(torch.ops, library.ns), name).default

    def rule(info: Any, in_dims: Sequence[int | None], *arguments: Any) -> tuple[Any, Any]:
        positions = batched(arguments, in_dims)
        if positions is None:
            logger.debug("%s: vmap: %d calls, one a slice", name, info.batch_size)
            outputs = _one_by_one(op, info.batch_size, arguments, in_dims)
        else:
            outputs = _at_once(op, info.batch_size, arguments, in_dims, positions)
        return outputs, 0 if isinstance(outputs, Tensor) else (0,) * len(outputs)

    torch.library.register_vmap(f"{library.ns}::{name}", rule, lib=library)


def _at_once(
    op: Any, count: int, arguments: Sequence[Any], in_dims: Sequence[int | None], positions: Sequence[int]
) -> Any:
    folded, images = list(arguments), 0
    for i in positions:
        tensor, dim = arguments[i], in_dims[i]
        if tensor is not None:
            slices = tensor.expand(count, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            folded[i], images = slices.flatten(0, 1), slices.shape[1]
    # the gradient of an absent tensor has one dimension, of size 0
    return _each(
        op(*folded), lambda found: found.expand(count, 0) if found.dim() == 1 else found.unflatten(0, (count, images))
    )


def _one_by_one(op: Any, count: int, arguments: Sequence[Any], in_dims: Sequence[int | None]) -> Any:
    pairs = list(zip(arguments, in_dims, strict=True))
    if count == 0:  # the shapes of outputs come from a slice of zeros
        slices = [a if dim is None else a.movedim(dim, 0).sum(0).to(a.dtype) for a, dim in pairs]
        return _each(op(*slices), lambda output: output[None][:0])
    calls = [op(*(a if dim is None else a.select(dim, i) for a, dim in pairs)) for i in range(count)]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls)
    return tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True))


def _each(found: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return change(found) if isinstance(found, Tensor) else tuple(change(output) for output in found)
