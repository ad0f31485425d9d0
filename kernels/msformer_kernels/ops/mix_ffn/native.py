"""MixFFN and MixFFN-skip through the compiled CPU kernels (csrc/cpu/mix_ffn).

The backward recomputes everything from the inputs, and from the hidden tensor where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msformer_kernels import _native
from msformer_kernels.native import arguments
from msformer_kernels.native.arguments import (
    activation,
    addresses,
    contiguous,
    empty_gradients,
    parameter_dtypes,
    rounded,
    settings,
)
from msformer_kernels.ops.mix_ffn.reference import ACTIVATIONS
from msformer_kernels.ops.mix_ffn.spec import OPERATOR, has_few_tokens, missing_of_half

_ACTIVATIONS = {name: number for number, name in enumerate(ACTIVATIONS)}
_BY_HALVES = ("fc1_weight", "fc1_bias", "dw_weight", "dw_bias")


def _works_on_whole_images(call: Any) -> bool:
    """Whether kernels take the form for few tokens, where weights may be bfloat16; never where there is nothing."""
    return has_few_tokens(call) and min(*call.x.shape[:2], call.fc1_weight.shape[0]) > 0


def _dtypes(call: Any) -> list[torch.dtype]:
    return parameter_dtypes(OPERATOR, call, _works_on_whole_images(call))


def _options(call: Any, matrix_dtype: torch.dtype) -> tuple[Any, ...]:
    """Sizes and options, as every entry point takes them first."""
    batch, _, channels = call.x.shape
    return (
        *settings(call.x, OPERATOR.matrices_of(call)),
        batch,
        call.height,
        call.width,
        channels,
        call.fc1_weight.shape[0],
        call.dw_weight.shape[2],
        arguments.FEW_TOKENS if _works_on_whole_images(call) else arguments.MANY_TOKENS,
        arguments.DTYPES[matrix_dtype],
        call.norm_eps,
        call.skip,
        call.residual,
        call.gated,
        _ACTIVATIONS[call.activation],
        _ACTIVATIONS[call.inner_activation],
    )


def _with_whole_halves(call: Any) -> Any:
    """The call with channels of zeros behind both halves of a gated one, as many as the kernels want."""
    missing = missing_of_half(call)
    if missing == 0:
        return call
    widened = {name: _widen_halves(p, missing) for name in _BY_HALVES if (p := getattr(call, name)) is not None}
    return call._replace(fc2_weight=F.pad(call.fc2_weight, (0, missing)), **widened)


def _widen_halves(parameter: Tensor, missing: int) -> Tensor:
    zeros = parameter.new_zeros(missing, *parameter.shape[1:])
    values, gates = parameter.chunk(2)
    return torch.cat((values, zeros, gates, zeros))


def _cut_halves(gradient: Tensor, missing: int) -> Tensor:
    return gradient.unflatten(0, (2, -1))[:, :-missing].flatten(0, 1)


def forward(call: Any) -> tuple[Tensor, ...]:
    x, call = call.x, _with_whole_halves(call)
    dtypes = _dtypes(call)
    parameters = contiguous(OPERATOR.parameters_of(call), dtypes)
    output, hidden = OPERATOR.fake(call)
    _native.mix_ffn_forward(
        (*_options(call, dtypes[0]), *activation(x), *addresses(parameters), *activation(hidden), *activation(output))
    )
    return output, hidden


def backward(call: Any, saved: Any, grads: Any) -> tuple[Tensor, ...]:
    grad_x, *gradients = _backward(_with_whole_halves(call), saved.hidden, grads)
    missing = missing_of_half(call)
    if missing == 0:
        return grad_x, *gradients
    cut: dict[str, Callable[[Tensor], Tensor]] = dict.fromkeys(_BY_HALVES, lambda g: _cut_halves(g, missing))
    cut["fc2_weight"] = lambda g: g[:, :-missing]
    return grad_x, *(
        cut[name](grad) if name in cut and grad.numel() > 0 else grad
        for name, grad in zip(OPERATOR.parameters, gradients, strict=True)
    )


def _backward(call: Any, hidden: Tensor, grads: Any) -> tuple[Tensor, ...]:
    x, given = call.x, OPERATOR.parameters_of(call)
    dtypes = _dtypes(call)
    parameters, gradients = contiguous(given, dtypes), empty_gradients(given, dtypes, x)
    grad_x = x.new_empty(x.shape)
    _native.mix_ffn_backward(
        (
            *_options(call, dtypes[0]),
            *activation(x),
            *addresses(parameters),
            *activation(hidden),
            *activation(grads.output),
            *activation(grad_x),
            *addresses(gradients),
        )
    )
    return (grad_x, *rounded(gradients, given))
