"""``msformer::efficient_attention``: schema, fake kernel, autograd, autocast.

The op also returns the maximum and sum of the key softmax, which the backward needs; they are not differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msformer_kernels.library import LIBRARY, Implementations, refuse_second_derivative, register, register_autocast
from msformer_kernels.precision import arithmetic_dtype

IMPLEMENTATIONS = Implementations(
    "msformer_kernels.efficient_attention", {"native": "native", "triton": "triton_calls"}
)

_OPTIONS = (
    "float query_scale, float key_scale, float output_scale, bool normalize_query, str normalization, str backend"
)
_SCHEMA = (
    f"(Tensor query, Tensor key, Tensor value, Tensor? mask, {_OPTIONS})"
    " -> (Tensor output, Tensor context, Tensor key_max, Tensor key_sum)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_output, Tensor? grad_context, Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor context,"
    f" Tensor key_max, Tensor key_sum, {_OPTIONS}) -> (Tensor, Tensor, Tensor)"
)


def _forward(*args: Any) -> tuple[Tensor, ...]:
    return IMPLEMENTATIONS[args[-1]].forward(*args[:-1])


def _backward(*args: Any) -> tuple[Tensor, ...]:
    return IMPLEMENTATIONS[args[-1]].backward(*args[:-1])


def _fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    batch, heads, tokens, key_channels = query.shape
    wide = arithmetic_dtype(query.dtype)
    statistics = [query.new_empty(batch, heads, key_channels, dtype=wide) for _ in range(2)]
    context = query.new_empty(batch, heads, key_channels, value.shape[3], dtype=wide)
    return query.new_empty(batch, heads, tokens, value.shape[3]), context, *statistics


def _backward_fake(grad_output: Tensor, grad_context: Tensor | None, *tensors: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in tensors[:3])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, mask, *options = inputs
    result, context, key_max, key_sum = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(key_max, key_sum)
    ctx.save_for_backward(query, key, value, mask, context, key_max, key_sum)
    ctx.options = options
    ctx.output_shape = result.shape


def _autograd(ctx: Any, grad_output: Tensor | None, grad_context: Tensor | None, *_: Any) -> tuple[Any, ...]:
    query, key, value, mask, context, key_max, key_sum = ctx.saved_tensors
    if grad_output is None:
        grad_output = query.new_zeros(1).expand(ctx.output_shape)
    gradients = _efficient_attention_backward(
        grad_output, grad_context, query, key, value, mask, context, key_max, key_sum, *ctx.options
    )
    return *gradients, None, *(None for _ in ctx.options)


def _autocast(op: Any, dtype: torch.dtype, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Any:
    if query.dtype == torch.float64:
        return op(query, key, value, *rest)
    return op(query.to(dtype), key.to(dtype), value.to(dtype), *rest)


register("efficient_attention", _SCHEMA, _forward, _fake)
register("efficient_attention_backward", _BACKWARD_SCHEMA, _backward, _backward_fake)
torch.library.register_autograd("msformer::efficient_attention", _autograd, setup_context=_setup_context, lib=LIBRARY)
refuse_second_derivative("efficient_attention_backward", "efficient_attention")
register_autocast("efficient_attention", _autocast)

efficient_attention = torch.ops.msformer.efficient_attention.default
_efficient_attention_backward = torch.ops.msformer.efficient_attention_backward.default
