"""A linear layer on the GPU: the vendor's matrix products, which are hard to beat at these shapes.

Named like the other modules of the backend "triton", whose models use it; there is no Triton in it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """-> output `[B, N, out]`."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def backward(
    grad_output: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, input_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of x, weight and bias; zero-size for an absent bias, and for x unless it is asked for."""
    flat = grad_output.flatten(0, 1)
    grad_x = grad_output @ weight.to(x.dtype) if input_gradient else x.new_empty(0)
    grad_weight = (flat.t() @ x.flatten(0, 1)).to(weight.dtype)
    if bias is None:
        return grad_x, grad_weight, x.new_empty(0, dtype=torch.float32)
    return grad_x, grad_weight, flat.sum(0, dtype=torch.float32).to(bias.dtype)
