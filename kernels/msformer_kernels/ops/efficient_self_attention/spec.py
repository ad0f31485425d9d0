"""The declaration of ``msformer::efficient_self_attention``.

The op also returns what its backward needs besides its inputs: the maximum and sum of the key softmax and the mean of
the tokens under it, `[B, Dk]` twice and `[B, Dk, C]`. On the CPU, images with few tokens, beside channels, are worked
on as published, not folded. That takes fewer multiplications there, and the op returns queries, keys, values and what
was attended, `[B, N, projected_width]`, in place of that mean, so that the backward does not make them again. The
gradient of the key bias is zero: the softmax over tokens cancels it, and no backend looks at it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msformer_kernels.core.layout import room_like
from msformer_kernels.core.operator import Operator
from msformer_kernels.core.precision import arithmetic_dtype
from msformer_kernels.core.registration import cast_output
from msformer_kernels.native import arguments
from msformer_kernels.ops.efficient_self_attention.reference import efficient_self_attention


def few_tokens(call: Any) -> Any:
    """1 if the CPU kernels do not fold a call, else 0; of symbolic sizes an expression, which is not decided on.

    Not folded, a token takes 4 C (Dk + Dv) + 4 Dk Dv / heads flop; folded, 8 C Dk, and an image 4 C Dk Dv / heads. That
    counts max(3, C / 64) times, as measured: a backward that has queries, keys and values is faster.
    """
    _, tokens, channels = call.x.shape
    keys, values = call.query_weight.shape[0], call.value_weight.shape[0]
    if arguments.FORM != arguments.BY_SHAPE:
        return torch.sym_min(1, tokens) * (arguments.FORM == arguments.FEW_TOKENS)
    of_heads = keys * values // call.num_heads
    weight = torch.sym_max(3, channels // 64)
    saved = weight * channels * of_heads - tokens * (channels * (values - keys) + of_heads)
    return torch.sym_min(1, tokens) * torch.sym_min(1, torch.sym_max(0, saved))


def projected_width(keys: Any, values: Any) -> Any:
    """Of a token's query, key, value and what it attended, each in whole blocks of 16 values. Tokens are an odd number
    of blocks apart, lest they push each other out of the first cache."""
    return 16 * (2 * (-(-keys // 16) + -(-values // 16)) + 1)


def room(call: Any, few: Any = 0) -> tuple[Tensor, ...]:
    """Empty tensors like the op's outputs, of the form for many or for few tokens."""
    x, heads = call.x, call.num_heads
    batch, tokens, channels = x.shape
    keys, values = call.query_weight.shape[0], call.value_weight.shape[0]
    wide = arithmetic_dtype(x.dtype)
    return (
        room_like(x),
        x.new_empty(batch, heads, keys // heads, values // heads, dtype=wide),
        x.new_empty(batch, keys, dtype=wide),
        x.new_empty(batch, keys, dtype=wide),
        x.new_empty(batch, keys * (1 - few), channels, dtype=wide),
        x.new_empty(batch, tokens * few, projected_width(keys, values), dtype=wide),
    )


def nothing_projected(call: Any) -> Tensor:
    """What a backend that does not keep queries, keys and values returns for them."""
    return room(call)[-1]


def _fake(call: Any) -> tuple[Tensor, ...]:
    """As the kernels of the device return it; those of GPUs that an emulation runs on the CPU, as on a GPU."""
    return room(call, few_tokens(call) if call.x.device.type == "cpu" else 0)


def _products(call: Any) -> int:
    """As published, unfolded: the projections, and context and output of every head."""
    weights = (call.query_weight, call.key_weight, call.value_weight, call.output_weight)
    batch, tokens, _ = call.x.shape
    memory = 0 if call.memory_key is None else call.memory_key.shape[1]
    of_a_token = call.query_weight.shape[0] * call.value_weight.shape[0] // call.num_heads
    return batch * (tokens * sum(weight.numel() for weight in weights) + (2 * tokens + memory) * of_a_token)


def _why_not_on_gpu(call: Any) -> str | None:
    """Why the kernels of a GPU do not take a call; None if they do."""
    if call.memory_key is not None:
        return "its kernels take no memory tokens"
    if call.norm_kind != "layer" and call.norm_weight is not None:
        return f"its kernels have no norm of kind {call.norm_kind!r}"
    if min(call.x.shape[2], call.query_weight.shape[0], call.value_weight.shape[0]) > 0:
        return None
    return "its kernels take at least one channel, key feature and value feature"


OPERATOR = Operator(
    efficient_self_attention,
    outputs=("output", "context"),
    state=("key_max", "key_sum", "key_tokens", "projected"),
    fake=_fake,
    products=_products,
    served_by=("native", "cuda", "triton"),
    without_gradient=("mask",),
    zero_gradient=("key_bias",),
    matrices=("query_weight", "key_weight", "value_weight", "output_weight"),
    keeps_layout=True,
    autocast=cast_output,
    limits={"cuda": _why_not_on_gpu, "triton": _why_not_on_gpu},
)


def kernel_parameters(call: Any) -> tuple[Tensor | None, ...]:
    """All but the memory tokens, which come last."""
    return OPERATOR.parameters_of(call)[:-2]


def nothing_of_memory(x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of memory tokens, where there are none."""
    return x.new_empty(0, dtype=arithmetic_dtype(x.dtype)), x.new_empty(0, dtype=arithmetic_dtype(x.dtype))
