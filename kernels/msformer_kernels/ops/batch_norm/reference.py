"""The specification of BatchNorm on tokens, in plain PyTorch.

Each channel is normalised over all tokens of the batch (Ioffe, Szegedy, "Batch Normalization", ICML 2015).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from msformer_kernels.core.precision import arithmetic_dtype


def as_image(x: Tensor) -> Tensor:
    """``[B, N, C]`` -> ``[B, C, N, 1]``, channels-last in memory and by its strides.

    Where strides leave open which of the two memory formats an image has, as `unsqueeze` would here, PyTorch 2.13 gives
    wrong gradients for a gradient that comes in the other format.
    """
    return x.contiguous().transpose(1, 2).unflatten(2, (x.shape[1], 1))


def as_tokens(image: Tensor) -> Tensor:
    """The way back."""
    return image.flatten(2).transpose(1, 2)


def batch_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """See `msformer_kernels.ops.batch_norm`."""
    output = as_tokens(F.batch_norm(as_image(x), None, None, weight, bias, training=True, eps=eps))
    variance, mean = torch.var_mean(x.detach().to(arithmetic_dtype(x.dtype)), (0, 1), correction=0)
    return output, mean, variance
