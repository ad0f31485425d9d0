"""``msformer::mix_ffn``: schema, fake kernel, autograd, autocast. The backward needs nothing but the inputs."""

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

IMPLEMENTATIONS = Implementations("msformer_kernels.mix_ffn", {"native": "native", "triton": "triton_calls"})

_ARGUMENTS = (
    "Tensor x, SymInt height, SymInt width, Tensor fc1_weight, Tensor? fc1_bias, Tensor dw_weight, Tensor? dw_bias,"
    " Tensor fc2_weight, Tensor? fc2_bias, bool skip, Tensor? hidden_norm_weight, Tensor? hidden_norm_bias,"
    " Tensor? norm_weight, Tensor? norm_bias, float norm_eps, str activation, bool residual, str backend"
)
_SCHEMA = f"({_ARGUMENTS}) -> Tensor"
_BACKWARD_SCHEMA = (
    f"(Tensor grad_output, {_ARGUMENTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# positions of the parameters, and of `residual`, among the arguments of the forward
_PARAMETERS = (3, 4, 5, 6, 7, 8, 10, 11, 12, 13)
_RESIDUAL = 16


def _forward(*args: Any) -> Tensor:
    return IMPLEMENTATIONS[args[-1]].forward(*args[:-1])


def _backward(*args: Any) -> tuple[Tensor, ...]:
    return IMPLEMENTATIONS[args[-1]].backward(*args[:-1])


def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _backward_fake(grad_output: Tensor, *args: Any) -> tuple[Tensor, ...]:
    x = args[0]
    wide = arithmetic_dtype(x.dtype)
    parameters = (args[i] for i in _PARAMETERS)
    return x.new_empty(x.shape), *(
        x.new_empty(0, dtype=wide) if p is None else p.new_empty(p.shape) for p in parameters
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], *(inputs[i] for i in _PARAMETERS))
    ctx.options = [None if i == 0 or i in _PARAMETERS else value for i, value in enumerate(inputs)]


def _autograd(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    x, *parameters = ctx.saved_tensors
    arguments = list(ctx.options)
    arguments[0] = x
    for i, parameter in zip(_PARAMETERS, parameters, strict=True):
        arguments[i] = parameter
    grad_x, *gradients = _mix_ffn_backward(grad_output, *arguments)
    result: list[Tensor | None] = [None] * len(arguments)
    result[0] = grad_x
    for i, gradient, parameter in zip(_PARAMETERS, gradients, parameters, strict=True):
        result[i] = optional(gradient, parameter)
    return tuple(result)


def _autocast(op: Any, dtype: torch.dtype, x: Tensor, *rest: Any) -> Tensor:
    """The native kernels compute in float32 whatever comes in, so nothing is cast on the way in; for Triton's the
    dtype of
    x decides. A sum with x has x's dtype."""
    residual, exact = rest[_RESIDUAL - 1], x.dtype == torch.float64
    if exact or rest[-1] != "triton":
        output = op(x, *rest)
        return output if residual or exact else output.to(dtype)
    output = op(x.to(dtype), *rest[: _RESIDUAL - 1], False, *rest[_RESIDUAL:])
    return x + output if residual else output


register("mix_ffn", _SCHEMA, _forward, _fake)
register("mix_ffn_backward", _BACKWARD_SCHEMA, _backward, _backward_fake)
torch.library.register_autograd("msformer::mix_ffn", _autograd, setup_context=_setup_context, lib=LIBRARY)
refuse_second_derivative("mix_ffn_backward", "mix_ffn")
register_autocast("mix_ffn", _autocast)

mix_ffn = torch.ops.msformer.mix_ffn.default
_mix_ffn_backward = torch.ops.msformer.mix_ffn_backward.default
