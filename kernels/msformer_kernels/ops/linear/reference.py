"""The specification of a linear layer on tokens, in plain PyTorch: ``x W^T + b``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `msformer_kernels.ops.linear`."""
    return F.linear(x, weight, bias)
