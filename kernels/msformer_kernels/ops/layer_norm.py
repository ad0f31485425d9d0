"""LayerNorm or RMSNorm of tokens in plain PyTorch, where a layer has one, and the backward of LayerNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NORMS = ("layer", "rms")


def norm_of(kind: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Over the last dimension of x; without a weight x as it is. RMSNorm: ``x / sqrt(mean(x^2) + eps)``."""
    if kind == "layer" or weight is None:
        return layer_norm(x, weight, bias, eps)
    normed = F.rms_norm(x, x.shape[-1:], weight, eps)
    return normed if bias is None else normed + bias


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Over the last dimension of x; without a weight x as it is."""
    return x if weight is None else F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, added: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of x (plus `added`), weight and bias, in the dtype of x."""
    shape, cast = x.shape[-1:], weight.to(x.dtype)
    _, mean, rstd = torch.native_layer_norm(x, shape, cast, None, eps)
    found = torch.ops.aten.native_layer_norm_backward(grad, x, shape, mean, rstd, cast, cast, [True, True, True])
    return found[0] if added is None else found[0].add_(added), found[1], found[2]
