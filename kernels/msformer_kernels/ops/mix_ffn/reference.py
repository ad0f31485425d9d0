"""MixFFN in plain PyTorch: the specification of the operator.

    U = [act_1](x W_1 + b_1),   Z = dw(U) + b_d [+ U],   output = act([LayerNorm](Z)) W_2 + b_2 [+ x]

With a gate, output = (Z_1 * act(Z_2)) W_2 + b_2 [+ x], where Z_1 and Z_2 are the halves of Z.

Xie et al., "SegFormer", NeurIPS 2021 (MixFFN); Huang et al., "MISSFormer", 2021 (the skip form with a hidden
LayerNorm); Wang et al., "PVT v2", 2022 (an activation before the convolution too, in its linear form); Xie et al.,
"SANA", 2024 (the gate).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from msformer_kernels.ops.layer_norm import layer_norm

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "relu6": F.relu6,
    "identity": lambda x: x,
}
"""By name, in the order of `ActivationFunction` in csrc/abi.h."""

KERNEL_SIZES = (3, 5, 7)
"""Rows and columns of the depthwise convolution."""


def mix_ffn(
    x: Tensor,
    height: int,
    width: int,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    skip: bool = False,
    hidden_norm_weight: Tensor | None = None,
    hidden_norm_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    activation: str = "gelu",
    inner_activation: str = "identity",
    residual: bool = False,
    gated: bool = False,
) -> Tensor:
    """See `msformer_kernels.ops.mix_ffn`."""
    tokens = layer_norm(x, norm_weight, norm_bias, norm_eps)
    hidden = ACTIVATIONS[inner_activation](F.linear(tokens, fc1_weight, fc1_bias))
    mixed = _convolve(hidden, height, width, dw_weight, dw_bias)
    if skip:
        mixed = mixed + hidden
    mixed = layer_norm(mixed, hidden_norm_weight, hidden_norm_bias, norm_eps)
    if gated:
        value, gate = mixed.chunk(2, dim=2)
        activated = value * ACTIVATIONS[activation](gate)
    else:
        activated = ACTIVATIONS[activation](mixed)
    output = F.linear(activated, fc2_weight, fc2_bias)
    return x + output if residual else output


def _convolve(hidden: Tensor, height: int, width: int, weight: Tensor, bias: Tensor | None) -> Tensor:
    if hidden.numel() == 0:
        # a convolution refuses an empty image; adding its parameters to no tokens gives them zero gradients
        return hidden + sum(p.sum() for p in (weight, bias) if p is not None)
    image = hidden.transpose(1, 2).unflatten(2, (height, width))
    convolved = F.conv2d(image, weight, bias, padding=weight.shape[2] // 2, groups=weight.shape[0])
    return convolved.flatten(2).transpose(1, 2)
