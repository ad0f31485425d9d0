"""Efficient self-attention unfolded, as published, for tokens that are too wide for the folded form of a backend.

Queries, keys and values are made by the vendor's matrix products and go through the kernels that a backend has for
efficient_attention. The key bias is not needed: the softmax over tokens cancels it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from msformer_kernels.core.gradients import placed
from msformer_kernels.core.layout import laid_like
from msformer_kernels.ops.efficient_self_attention.spec import kernel_parameters, nothing_of_memory, nothing_projected
from msformer_kernels.ops.layer_norm import layer_norm


class Attention(Protocol):
    """The kernels of a backend for efficient_attention without options; its module there has them.

    Queries, keys, values, outputs and their gradients are `[B, heads, N, D]` of any strides, masks `[B, N]`. Context
    `[B, heads, Dk, Dv]`, maximum and sum of the key softmax `[B, heads, Dk]` are float32.
    """

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, output: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Fills the output; -> context, key_max and key_sum."""
        ...

    def attend_context(self, query: Tensor, context: Tensor, output: Tensor) -> None:
        """Fills the output from a context that is known."""
        ...

    def attend_backward(
        self,
        grad_output: Tensor,
        grad_context: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        state: tuple[Tensor, Tensor, Tensor],
        grads: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """Fills the gradients of query, key and value. `state` is what `attend` returned."""
        ...


LayerNormBackward = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], tuple[Tensor, Tensor, Tensor]]
"""(gradient, x, weight, eps, gradient of the residual) -> gradients of x, weight and bias."""


def _cast(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.to(x.dtype)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """`[B, N, D]` -> `[B, heads, N, D / heads]`, a view."""
    return x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(1, 2)


def _projected(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> tokens `[B, N, C]` after the norm; query, key and value."""
    x = call.x
    tokens = layer_norm(x, _cast(call.norm_weight, x), _cast(call.norm_bias, x), call.norm_eps)

    def project(weight: Tensor, bias: Tensor | None) -> Tensor:
        return _split_heads(F.linear(tokens, weight.to(x.dtype), _cast(bias, x)), call.num_heads)

    query, key = project(call.query_weight, call.query_bias), project(call.key_weight, None)
    return tokens, query, key, project(call.value_weight, call.value_bias)


def _room_for_output(query: Tensor, value: Tensor) -> Tensor:
    """`[B, N, Dv]`: all heads side by side."""
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1] * value.shape[3])


def forward(call: Any, attention: Attention) -> tuple[Tensor, ...]:
    """All outputs of the op. The tokens under the key softmax, which only a folded form has, are NaN: a backward of the
    folded form is then not wrong in silence."""
    x, heads = call.x, call.num_heads
    _, query, key, value = _projected(call)
    attended = _room_for_output(query, value)
    context, key_max, key_sum = attention.attend(query, key, value, call.mask, _split_heads(attended, heads))
    output = F.linear(attended, call.output_weight.to(x.dtype), _cast(call.output_bias, x))
    if call.residual:
        output += x
    key_tokens = context.new_full((x.shape[0], call.query_weight.shape[0], x.shape[2]), float("nan"))
    state = context, key_max.flatten(1), key_sum.flatten(1), key_tokens, nothing_projected(call)
    return laid_like(output, x), *state


def backward(
    call: Any, saved: Any, grads: Any, attention: Attention, layer_norm_backward: LayerNormBackward
) -> tuple[Tensor, ...]:
    """The gradients of x and of the parameters, as `Operator` asks for them."""
    x, heads, grad_output = call.x, call.num_heads, grads.output
    tokens, query, key, value = _projected(call)
    attended = _room_for_output(query, value)
    attention.attend_context(query, saved.context, _split_heads(attended, heads))
    grad_attended = grad_output @ call.output_weight.to(x.dtype)
    # gradients of queries, keys and values side by side, so that each product with them is one
    widths = [part.shape[3] * heads for part in (query, key, value)]
    grad_projected = x.new_empty(*x.shape[:2], sum(widths))
    by_head = [_split_heads(part, heads) for part in grad_projected.split(widths, -1)]
    attention.attend_backward(
        _split_heads(grad_attended, heads),
        grads.context,
        query,
        key,
        value,
        call.mask,
        (saved.context, saved.key_max, saved.key_sum),
        (by_head[0], by_head[1], by_head[2]),
    )
    weight = torch.cat([call.query_weight, call.key_weight, call.value_weight]).to(x.dtype)
    grad_tokens = grad_projected @ weight
    flat, flat_grad = grad_projected.flatten(0, 1), grad_output.flatten(0, 1)
    grad_weights = (flat.t() @ tokens.flatten(0, 1)).split(widths)
    grad_biases = flat.sum(0, dtype=torch.float32).split(widths)
    grad_norm_weight = grad_norm_bias = None
    if call.norm_weight is not None:
        added = grad_output if call.residual else None
        grad_x, grad_norm_weight, grad_norm_bias = layer_norm_backward(
            grad_tokens, x, call.norm_weight, call.norm_eps, added
        )
    else:
        grad_x = grad_tokens + grad_output if call.residual else grad_tokens
    gradients = (
        grad_weights[0],
        grad_biases[0],
        grad_weights[1],
        grad_weights[2],
        grad_biases[2],
        flat_grad.t() @ attended.flatten(0, 1),
        flat_grad.sum(0, dtype=torch.float32),
        grad_norm_weight,
        grad_norm_bias,
    )
    return laid_like(grad_x, x), *placed(gradients, kernel_parameters(call), x), *nothing_of_memory(x)
