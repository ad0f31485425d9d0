"""Memory tokens on backends whose kernels have none: in front of keys and values, in one more tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msformer_kernels.core.layout import placed_like, room_like
from msformer_kernels.ops.efficient_attention.reference import with_memory


def joined(call: Any) -> Any:
    """The call without a memory that computes the same."""
    key, value, mask = with_memory(call.key, call.value, call.mask, call.memory_key, call.memory_value)
    return call._replace(key=key, value=value, mask=mask, memory_key=None, memory_value=None)


def separated(call: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a call, from those of the joined one."""
    if call.memory_key is None:
        return query, key, value, *(query.new_empty(0, dtype=torch.float32) for _ in range(2))
    found, memory = [], []
    for gradient, own, shared in ((key, call.key, call.memory_key), (value, call.value, call.memory_value)):
        tokens = shared.shape[1]
        found.append(placed_like(gradient[:, :, tokens:], room_like(own)))
        memory.append(placed_like(gradient[:, :, :tokens].float().sum(0).to(shared.dtype), room_like(shared)))
    return query, *found, *memory
