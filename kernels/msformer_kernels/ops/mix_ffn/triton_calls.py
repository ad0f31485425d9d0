"""MixFFN and MixFFN-skip through Triton kernels (triton_kernels.py) and the vendor's matrix products.

The backward recomputes everything from the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from msformer_kernels.core.gradients import placed
from msformer_kernels.ops.layer_norm import layer_norm
from msformer_kernels.ops.mix_ffn.reference import ACTIVATIONS
from msformer_kernels.ops.mix_ffn.spec import OPERATOR, nothing_kept
from msformer_kernels.ops.mix_ffn.triton_kernels import (
    mix_ffn_activation_backward_kernel,
    mix_ffn_activation_kernel,
    mix_ffn_convolution_backward_kernel,
)
from msformer_kernels.triton.launch import block_size, cdiv, layer_norm_backward, processors
from msformer_kernels.triton.table import launch_options

_aten = torch.ops.aten
_BACKWARDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": _aten.gelu_backward,
    "gelu_tanh": lambda grad, x: _aten.gelu_backward(grad, x, approximate="tanh"),
    "relu": lambda grad, x: _aten.threshold_backward(grad, x, 0),
    "silu": _aten.silu_backward,
    "hardswish": _aten.hardswish_backward,
    "relu6": lambda grad, x: _aten.hardtanh_backward(grad, x, 0, 6),
    "identity": lambda grad, x: grad,
}
"""Of an activation before the convolution, a pass of PyTorch's own; within an operator there is no autograd."""


class Walk(NamedTuple):
    """How an image is cut into programs: bands of rows, tiles of columns and of hidden features."""

    cuts: tuple[int, int, int]
    """Bands, rows of each, tiles of columns."""
    grid: tuple[int, int]
    """Bands and tiles of columns of every image (of which there may be more than 65535), tiles of features."""
    blocks: dict[str, Any]


def _walk(kernel: str, hidden: Tensor, height: int, width: int, whole: bool) -> Walk:
    """`whole`: a program holds all hidden features."""
    batch, _, features = hidden.shape
    blocks = launch_options(kernel, features, hidden)
    values = blocks.pop("tile")
    blocks["BH"] = block_size(features, least=1) if whole else block_size(features, least=1, most=blocks["BH"])
    blocks["BW"] = max(1, min(values // blocks["BH"], block_size(width, least=1)))
    if blocks["BW"] * blocks["BH"] > values:
        blocks["num_warps"] = 16
    columns, tiles = cdiv(width, blocks["BW"]), cdiv(features, blocks["BH"])
    wanted = cdiv(4 * processors(hidden.device), batch * columns * tiles)
    band_rows = max(8, cdiv(height, wanted))
    bands = cdiv(height, band_rows)
    return Walk((bands, band_rows, columns), (batch * bands * columns, tiles), blocks)


def _normed(call: Any) -> Tensor:
    """x after the norm."""
    weight, bias = (None if p is None else p.to(call.x.dtype) for p in (call.norm_weight, call.norm_bias))
    return layer_norm(call.x, weight, bias, call.norm_eps)


def _mixing(call: Any, like: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """What the kernels that make Z take: pointers (`like` stands for an absent one) and constants. The taps come as
    `[9, hidden]`, for their loads to be of whole vectors."""
    taps = call.dw_weight.flatten(1).t()
    given = taps, call.dw_bias, call.hidden_norm_weight, call.hidden_norm_bias
    _, bias, norm, norm_bias = (p is not None for p in given)
    constants = {"BIAS": bias, "NORM": norm, "NORM_BIAS": norm_bias, "SKIP": call.skip, "ACTIVATION": call.activation}
    return tuple(like if p is None else p.contiguous() for p in given), constants


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def forward(call: Any) -> tuple[Tensor, ...]:
    x, height, width = call.x, call.height, call.width
    if x.numel() == 0:
        return x.new_empty(x.shape), nothing_kept(call)
    hidden = ACTIVATIONS[call.inner_activation](_linear(_normed(call), call.fc1_weight, call.fc1_bias))
    activated = torch.empty_like(hidden)
    pointers, constants = _mixing(call, hidden)
    walk = _walk("activation", hidden, height, width, constants["NORM"])
    mix_ffn_activation_kernel[walk.grid](
        hidden,
        *pointers,
        activated,
        height,
        width,
        hidden.shape[2],
        *walk.cuts,
        call.norm_eps,
        **constants,
        **walk.blocks,
    )
    output = _linear(activated, call.fc2_weight, call.fc2_bias)
    return output.add_(x) if call.residual else output, nothing_kept(call)


def backward(call: Any, saved: Any, grads: Any) -> tuple[Tensor, ...]:
    x, height, width, grad_output = call.x, call.height, call.width, grads.output
    parameters = OPERATOR.parameters_of(call)
    if x.numel() == 0:
        zeros = (x.new_zeros(0, dtype=torch.float32) if p is None else torch.zeros_like(p) for p in parameters)
        return x.new_zeros(x.shape), *zeros
    tokens = _normed(call)
    before = _linear(tokens, call.fc1_weight, call.fc1_bias)
    hidden = ACTIVATIONS[call.inner_activation](before)
    features = hidden.shape[2]
    pointers, constants = _mixing(call, hidden)

    grad_activated = grad_output @ call.fc2_weight.to(x.dtype)
    activated, grad_mixed = torch.empty_like(hidden), torch.empty_like(hidden)
    walk = _walk("activation_backward", hidden, height, width, constants["NORM"])
    norm_partials = hidden.new_empty(walk.grid[0], 2, features, dtype=torch.float32)
    mix_ffn_activation_backward_kernel[walk.grid](
        hidden,
        grad_activated,
        *pointers,
        activated,
        grad_mixed,
        norm_partials,
        height,
        width,
        features,
        *walk.cuts,
        call.norm_eps,
        **constants,
        **walk.blocks,
    )
    flat_grad = grad_output.flatten(0, 1)
    grad_fc2_weight = flat_grad.t() @ activated.flatten(0, 1)

    grad_hidden = activated  # its values are not needed any more
    walk = _walk("convolution_backward", hidden, height, width, whole=False)
    partials = hidden.new_empty(walk.grid[0], 11, features, dtype=torch.float32)
    mix_ffn_convolution_backward_kernel[walk.grid](
        grad_mixed,
        hidden,
        pointers[0],
        grad_hidden,
        partials,
        height,
        width,
        features,
        *walk.cuts,
        SKIP=call.skip,
        **walk.blocks,
    )
    sums = partials.sum(0)
    grad_hidden = _BACKWARDS[call.inner_activation](grad_hidden, before)
    fc1_bias = sums[10] if call.inner_activation == "identity" else grad_hidden.sum((0, 1), dtype=torch.float32)
    grad_fc1_weight = grad_hidden.flatten(0, 1).t() @ tokens.flatten(0, 1)
    grad_tokens = grad_hidden @ call.fc1_weight.to(x.dtype)
    grad_hidden_norm = norm_partials.sum(0) if constants["NORM"] else sums[:2]
    grad_norm_weight = grad_norm_bias = sums[0]
    if call.norm_weight is not None:
        added = grad_output if call.residual else None
        grad_x, grad_norm_weight, grad_norm_bias = layer_norm_backward(
            grad_tokens, x, call.norm_weight, call.norm_eps, added
        )
    else:
        grad_x = grad_tokens.add_(grad_output) if call.residual else grad_tokens
    gradients = (
        grad_fc1_weight,
        fc1_bias,
        sums[:9].t(),
        sums[9],
        grad_fc2_weight,
        flat_grad.sum(0, dtype=torch.float32),
        *grad_hidden_norm,
        grad_norm_weight,
        grad_norm_bias,
    )
    return grad_x, *placed(gradients, parameters, x)
