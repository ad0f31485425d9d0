"""``msformer::batch_norm``: schema, fake kernel, autograd. The statistics that it returns are for the backward and for
running averages; they are not differentiated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msformer_kernels.library import LIBRARY, Implementations, optional, refuse_second_derivative, register
from msformer_kernels.precision import arithmetic_dtype

IMPLEMENTATIONS = Implementations("msformer_kernels.batch_norm", {"native": "native", "triton": "triton_calls"})

_SCHEMA = "(Tensor x, Tensor? weight, Tensor? bias, float eps, str backend) -> (Tensor, Tensor, Tensor)"
_BACKWARD_SCHEMA = (
    "(Tensor grad_output, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor variance, float eps, str backend)"
    " -> (Tensor, Tensor, Tensor)"
)


def _forward(*args: Any) -> tuple[Tensor, ...]:
    return IMPLEMENTATIONS[args[-1]].forward(*args[:-1])


def _backward(*args: Any) -> tuple[Tensor, ...]:
    return IMPLEMENTATIONS[args[-1]].backward(*args[:-1])


def _fake(x: Tensor, *_: Any) -> tuple[Tensor, ...]:
    statistics = (x.new_empty(x.shape[2], dtype=arithmetic_dtype(x.dtype)) for _ in range(2))
    return x.new_empty(x.shape), *statistics


def _backward_fake(
    grad_output: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    wide = arithmetic_dtype(x.dtype)
    gradients = (x.new_empty(0, dtype=wide) if p is None else p.new_empty(p.shape) for p in (weight, bias))
    return x.new_empty(x.shape), *gradients


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, ctx.eps, ctx.backend = inputs
    _, mean, variance = output
    ctx.save_for_backward(x, weight, bias, mean, variance)
    ctx.mark_non_differentiable(mean, variance)


def _autograd(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Any, ...]:
    x, weight, bias, mean, variance = ctx.saved_tensors
    grad_x, *gradients = _batch_norm_backward(grad_output, x, weight, bias, mean, variance, ctx.eps, ctx.backend)
    return grad_x, optional(gradients[0], weight), optional(gradients[1], bias), None, None


register("batch_norm", _SCHEMA, _forward, _fake)
register("batch_norm_backward", _BACKWARD_SCHEMA, _backward, _backward_fake)
torch.library.register_autograd("msformer::batch_norm", _autograd, setup_context=_setup_context, lib=LIBRARY)
refuse_second_derivative("batch_norm_backward", "batch_norm")

batch_norm = torch.ops.msformer.batch_norm.default
_batch_norm_backward = torch.ops.msformer.batch_norm_backward.default
