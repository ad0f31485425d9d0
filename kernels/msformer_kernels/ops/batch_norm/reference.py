"""The specification of BatchNorm on tokens, in plain PyTorch.

Each channel is normalised over all tokens of the batch (Ioffe, Szegedy, "Batch Normalization", ICML 2015).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msformer_kernels.core.precision import arithmetic_dtype


def as_rows(x: Tensor) -> Tensor:
    """``[B, N, C]`` -> ``[B * N, C]``.

    An image of one column has strides that fit both memory formats, for some sizes at least. PyTorch 2.13 then gives
    wrong gradients for a gradient that comes in the other format.
    """
    return x.flatten(0, 1)


def norm_of_tokens(
    x: Tensor, mean: Tensor | None, variance: Tensor | None, weight: Tensor | None, bias: Tensor | None, **options: Any
) -> Tensor:
    """`torch.nn.functional.batch_norm` of ``[B, N, C]``, with its arguments.

    The weight is made contiguous: the backward of PyTorch 2.13 reads one with gaps as if it had none.
    """
    weight, bias = (p if p is None else p.contiguous() for p in (weight, bias))
    return F.batch_norm(as_rows(x), mean, variance, weight, bias, **options).view(x.shape)


def batch_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """See `msformer_kernels.ops.batch_norm`."""
    output = norm_of_tokens(x, None, None, weight, bias, training=True, eps=eps)
    variance, mean = torch.var_mean(x.detach().to(arithmetic_dtype(x.dtype)), (0, 1), correction=0)
    return output, mean, variance
