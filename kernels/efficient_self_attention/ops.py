"""``msformer::efficient_self_attention``: schema, fake kernel, autograd, autocast.

The op also returns what its backward needs besides its inputs: the maximum and sum of the key softmax and the mean of
the tokens under it, `[B, Dk]` twice and `[B, Dk, C]`. The key bias is an input only to get its gradient, zero: the
softmax over tokens cancels it, and the implementations do not see it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msformer_kernels.library import (
    LIBRARY,
    Implementations,
    optional,
    refuse_second_derivative,
    register,
    register_autocast,
)
from msformer_kernels.precision import arithmetic_dtype

IMPLEMENTATIONS = Implementations(
    "msformer_kernels.efficient_self_attention", {"native": "native", "triton": "triton_calls"}
)

_PARAMETERS = (
    "Tensor query_weight, Tensor? query_bias, Tensor key_weight, Tensor value_weight, Tensor? value_bias,"
    " Tensor output_weight"
)
_OPTIONS = (
    "int num_heads, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, bool residual, Tensor? mask, str backend"
)
_STATE = "Tensor context, Tensor key_max, Tensor key_sum, Tensor key_tokens"
_SCHEMA = f"(Tensor x, Tensor? key_bias, {_PARAMETERS}, Tensor? output_bias, {_OPTIONS}) -> (Tensor output, {_STATE})"
_BACKWARD_SCHEMA = (
    f"(Tensor grad_output, Tensor? grad_context, Tensor x, {_PARAMETERS}, {_STATE}, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_RESIDUAL = 13  # position of `residual` among the arguments of the forward


def _forward(x: Tensor, key_bias: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    return IMPLEMENTATIONS[args[-1]].forward(x, *args[:-1])


def _backward(*args: Any) -> tuple[Tensor, ...]:
    return IMPLEMENTATIONS[args[-1]].backward(*args[:-1])


def _fake(x: Tensor, key_bias: Tensor | None, query_weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    value_weight, num_heads = rest[2], rest[6]
    batch, _, channels = x.shape
    key_channels, value_channels = query_weight.shape[0], value_weight.shape[0]
    wide = arithmetic_dtype(x.dtype)
    return (
        x.new_empty(x.shape),
        x.new_empty(batch, num_heads, key_channels // num_heads, value_channels // num_heads, dtype=wide),
        x.new_empty(batch, key_channels, dtype=wide),
        x.new_empty(batch, key_channels, dtype=wide),
        x.new_empty(batch, key_channels, channels, dtype=wide),
    )


def _backward_fake(grad_output: Tensor, grad_context: Tensor | None, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    parameters, norm = rest[:6], rest[11:13]
    output_weight = parameters[5]
    output_bias = output_weight.new_empty(output_weight.shape[0])
    return x.new_empty(x.shape), *(
        x.new_empty(0, dtype=arithmetic_dtype(x.dtype)) if p is None else p.new_empty(p.shape)
        for p in (*parameters, output_bias, *norm)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, key_bias, *parameters, output_bias, num_heads, norm_weight, norm_bias, norm_eps, residual, mask, backend = inputs
    _, context, key_max, key_sum, key_tokens = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(key_max, key_sum, key_tokens)
    saved = (output_bias, norm_weight, norm_bias, mask, context, key_max, key_sum, key_tokens)
    ctx.save_for_backward(x, key_bias, *parameters, *saved)
    ctx.options = num_heads, norm_eps, residual, backend


def _autograd(ctx: Any, grad_output: Tensor | None, grad_context: Tensor | None, *_: Any) -> tuple[Any, ...]:
    *inputs, context, key_max, key_sum, key_tokens = ctx.saved_tensors
    x, key_bias, *parameters, output_bias, norm_weight, norm_bias, mask = inputs
    state = context, key_max, key_sum, key_tokens
    num_heads, norm_eps, residual, backend = ctx.options
    if grad_output is None:
        grad_output = x.new_zeros(1).expand(x.shape)
    options = num_heads, norm_weight, norm_bias, norm_eps, residual, mask, backend
    grad_x, *gradients = _efficient_self_attention_backward(grad_output, grad_context, x, *parameters, *state, *options)
    *of_parameters, of_norm_weight, of_norm_bias = map(
        optional, gradients, (*parameters, output_bias, norm_weight, norm_bias)
    )
    of_key_bias = None if key_bias is None else torch.zeros_like(key_bias)
    return grad_x, of_key_bias, *of_parameters, None, of_norm_weight, of_norm_bias, None, None, None, None


def _autocast(op: Any, dtype: torch.dtype, x: Tensor, *rest: Any) -> Any:
    """The native kernels compute in float32 whatever comes in, so nothing is cast on the way in; for Triton's the
    dtype of
    x decides. A sum with x has x's dtype."""
    residual, exact = rest[_RESIDUAL - 1], x.dtype == torch.float64
    if exact or rest[-1] != "triton":
        output, *state = op(x, *rest)
        return output if residual or exact else output.to(dtype), *state
    without = (*rest[: _RESIDUAL - 1], False, *rest[_RESIDUAL:])
    output, *state = op(x.to(dtype), *without)
    return x + output if residual else output, *state


register("efficient_self_attention", _SCHEMA, _forward, _fake)
register("efficient_self_attention_backward", _BACKWARD_SCHEMA, _backward, _backward_fake)
torch.library.register_autograd(
    "msformer::efficient_self_attention", _autograd, setup_context=_setup_context, lib=LIBRARY
)
refuse_second_derivative("efficient_self_attention_backward", "efficient_self_attention")
register_autocast("efficient_self_attention", _autocast)

efficient_self_attention = torch.ops.msformer.efficient_self_attention.default
_efficient_self_attention_backward = torch.ops.msformer.efficient_self_attention_backward.default
