"""How a backend hands back gradients of parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def placed(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """Gradients of parameters, which may be views of larger sums, in tensors of their own, shaped and typed like the
    parameters; zero-size for an absent parameter."""
    results = [like.new_empty(0, dtype=torch.float32) if p is None else p.new_empty(p.shape) for p in parameters]
    pairs = [
        (r, g.reshape(r.shape))
        for r, g, p in zip(results, gradients, parameters, strict=True)
        if p is not None and g is not None
    ]
    if pairs:
        torch._foreach_copy_([r for r, _ in pairs], [g for _, g in pairs])
    return tuple(results)
