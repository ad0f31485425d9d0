"""MixFFN and MixFFN-skip through Triton kernels (triton_kernels.py) and the vendor's matrix products.

Tensors are validated by the caller. The backward recomputes everything from the inputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from msformer_kernels.mix_ffn.triton_kernels import (
    activation_backward_kernel,
    activation_kernel,
    convolution_backward_kernel,
)
from msformer_kernels.triton_common import block_size, cdiv, layer_norm_backward, placed, processors
from msformer_kernels.triton_table import launch_options


class Walk(NamedTuple):
    """How an image is cut into programs: bands of rows, tiles of columns and of hidden features."""

    bands: int
    band_rows: int
    grid: tuple[int, int, int]
    blocks: dict[str, int]

    @property
    def partials(self) -> int:
        return self.grid[0] * self.grid[1]


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
    return Walk(bands, band_rows, (batch * bands, columns, tiles), blocks)


class Layer(NamedTuple):
    """The parameters and options of a call, parameters contiguous and in the dtype of x, but for norms and taps."""

    fc1_weight: Tensor
    fc1_bias: Tensor | None
    dw_weight: Tensor
    dw_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None
    skip: bool
    hidden_norm_weight: Tensor | None
    hidden_norm_bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    norm_eps: float
    activation: str
    residual: bool

    def tokens(self, x: Tensor) -> Tensor:
        """x after the norm."""
        if self.norm_weight is None:
            return x
        bias = None if self.norm_bias is None else self.norm_bias.to(x.dtype)
        return F.layer_norm(x, x.shape[-1:], self.norm_weight.to(x.dtype), bias, self.norm_eps)

    def options(self, like: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """What the kernels that make Z take: pointers (`like` stands for an absent one) and constants."""
        given = self.dw_weight, self.dw_bias, self.hidden_norm_weight, self.hidden_norm_bias
        constants = {
            "SKIP": self.skip,
            "BIAS": self.dw_bias is not None,
            "NORM": self.hidden_norm_weight is not None,
            "NORM_BIAS": self.hidden_norm_bias is not None,
            "ACTIVATION": self.activation,
        }
        return tuple(like if p is None else p.contiguous() for p in given), constants


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def forward(x: Tensor, height: int, width: int, *given: Any) -> Tensor:
    """-> output `[B, height * width, C]`. `given` are the fields of `Layer`."""
    if x.numel() == 0:
        return x.new_empty(x.shape)
    layer = Layer(*given)
    hidden = _linear(layer.tokens(x), layer.fc1_weight, layer.fc1_bias)
    activated = torch.empty_like(hidden)
    pointers, constants = layer.options(hidden)
    walk = _walk("activation", hidden, height, width, constants["NORM"])
    activation_kernel[walk.grid](
        hidden,
        *pointers,
        activated,
        height,
        width,
        hidden.shape[2],
        walk.bands,
        walk.band_rows,
        layer.norm_eps,
        **constants,
        **walk.blocks,
    )
    output = _linear(activated, layer.fc2_weight, layer.fc2_bias)
    return output.add_(x) if layer.residual else output


def backward(grad_output: Tensor, x: Tensor, height: int, width: int, *given: Any) -> tuple[Tensor, ...]:
    """-> gradients of x and of the parameters in the order of the arguments; zero-size for an absent one."""
    layer = Layer(*given)
    parameters = (*layer[:6], *layer[7:11])
    if x.numel() == 0:
        zeros = (x.new_zeros(0, dtype=torch.float32) if p is None else torch.zeros_like(p) for p in parameters)
        return x.new_zeros(x.shape), *zeros
    tokens = layer.tokens(x)
    hidden = _linear(tokens, layer.fc1_weight, layer.fc1_bias)
    features = hidden.shape[2]
    pointers, constants = layer.options(hidden)

    grad_activated = grad_output @ layer.fc2_weight.to(x.dtype)
    activated, grad_mixed = torch.empty_like(hidden), torch.empty_like(hidden)
    walk = _walk("activation_backward", hidden, height, width, constants["NORM"])
    norm_partials = hidden.new_empty(walk.partials, 2, features, dtype=torch.float32)
    activation_backward_kernel[walk.grid](
        hidden,
        grad_activated,
        *pointers,
        activated,
        grad_mixed,
        norm_partials,
        height,
        width,
        features,
        walk.bands,
        walk.band_rows,
        layer.norm_eps,
        **constants,
        **walk.blocks,
    )
    flat_grad = grad_output.flatten(0, 1)
    grad_fc2_weight = flat_grad.t() @ activated.flatten(0, 1)

    grad_hidden = activated  # its values are not needed any more
    walk = _walk("convolution_backward", hidden, height, width, whole=False)
    partials = hidden.new_empty(walk.partials, 11, features, dtype=torch.float32)
    convolution_backward_kernel[walk.grid](
        grad_mixed,
        hidden,
        pointers[0],
        grad_hidden,
        partials,
        height,
        width,
        features,
        walk.bands,
        walk.band_rows,
        SKIP=layer.skip,
        **walk.blocks,
    )
    sums = partials.sum(0)
    grad_fc1_weight = grad_hidden.flatten(0, 1).t() @ tokens.flatten(0, 1)
    grad_tokens = grad_hidden @ layer.fc1_weight.to(x.dtype)
    grad_hidden_norm = norm_partials.sum(0) if constants["NORM"] else sums[:2]
    grad_norm_weight = grad_norm_bias = sums[0]
    if layer.norm_weight is not None:
        added = grad_output if layer.residual else None
        grad_x, grad_norm_weight, grad_norm_bias = layer_norm_backward(
            grad_tokens, x, layer.norm_weight, layer.norm_eps, added
        )
    else:
        grad_x = grad_tokens.add_(grad_output) if layer.residual else grad_tokens
    gradients = (
        grad_fc1_weight,
        sums[10],
        sums[:9].t(),
        sums[9],
        grad_fc2_weight,
        flat_grad.sum(0, dtype=torch.float32),
        *grad_hidden_norm,
        grad_norm_weight,
        grad_norm_bias,
    )
    return grad_x, *placed(gradients, parameters, x)
