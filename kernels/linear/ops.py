"""``msformer::linear``: schema, fake kernel, autograd, autocast."""

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

IMPLEMENTATIONS = Implementations("msformer_kernels.linear", {"native": "native", "triton": "triton_calls"})

_SCHEMA = "(Tensor x, Tensor weight, Tensor? bias, str backend) -> Tensor"
_BACKWARD_SCHEMA = (
    "(Tensor grad_output, Tensor x, Tensor weight, Tensor? bias, bool input_gradient, str backend)"
    " -> (Tensor, Tensor, Tensor)"
)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return IMPLEMENTATIONS[backend].forward(x, weight, bias)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    return IMPLEMENTATIONS[args[-1]].backward(*args[:-1])


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[0])


def _backward_fake(
    grad_output: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, input_gradient: bool, backend: str
) -> tuple[Tensor, ...]:
    return (
        x.new_empty(x.shape if input_gradient else 0),
        weight.new_empty(weight.shape),
        x.new_empty(0, dtype=arithmetic_dtype(x.dtype)) if bias is None else bias.new_empty(bias.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.backend = inputs
    ctx.save_for_backward(x, weight, bias)


def _autograd(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    x, weight, bias = ctx.saved_tensors
    input_gradient = ctx.needs_input_grad[0]
    grad_x, grad_weight, grad_bias = _linear_backward(grad_output, x, weight, bias, input_gradient, ctx.backend)
    return grad_x if input_gradient else None, grad_weight, optional(grad_bias, bias), None


def _autocast(op: Any, dtype: torch.dtype, x: Tensor, *rest: Any) -> Tensor:
    """The native kernels compute in float32 whatever comes in, so nothing is cast on the way in; on the GPU the dtype
    of x
    decides."""
    if x.dtype == torch.float64:
        return op(x, *rest)
    return op(x.to(dtype) if rest[-1] == "triton" else x, *rest).to(dtype)


register("linear", _SCHEMA, _forward, _fake)
register("linear_backward", _BACKWARD_SCHEMA, _backward, _backward_fake)
torch.library.register_autograd("msformer::linear", _autograd, setup_context=_setup_context, lib=LIBRARY)
refuse_second_derivative("linear_backward", "linear")
register_autocast("linear", _autocast)

linear = torch.ops.msformer.linear.default
_linear_backward = torch.ops.msformer.linear_backward.default
