"""Efficient self-attention through Triton kernels: which form a shape gets, and its launches.

Up to 128 channels and key features, in a dtype that tensor cores take, the folded form (triton_kernels.py,
triton_backward.py). Wider, its tiles no longer fit the registers, nor do they in full float32, of which a product takes
three terms (measured by `python -m benchmarks.ahead_of_time`); then the unfolded form (unfolded.py) on the Triton
kernels of efficient_attention.

The key bias is not needed: the softmax over tokens cancels it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from msformer_kernels.core.gradients import placed
from msformer_kernels.core.layout import laid_like, room_like
from msformer_kernels.ops.efficient_attention import triton_calls as attention
from msformer_kernels.ops.efficient_attention.triton_calls import combine, kept_tokens
from msformer_kernels.ops.efficient_self_attention import unfolded
from msformer_kernels.ops.efficient_self_attention.spec import (
    OPERATOR,
    kernel_parameters,
    nothing_of_memory,
    nothing_projected,
    room,
)
from msformer_kernels.ops.efficient_self_attention.triton_backward import (
    self_attention_fold_backward_kernel,
    self_attention_query_backward_kernel,
    self_attention_token_backward_kernel,
    self_attention_weight_gradient_kernel,
)
from msformer_kernels.ops.efficient_self_attention.triton_kernels import (
    self_attention_fold_kernel,
    self_attention_key_tokens_kernel,
    self_attention_output_kernel,
)
from msformer_kernels.triton.device import architecture, compile_options
from msformer_kernels.triton.launch import (
    DTYPES,
    alignment,
    block_size,
    cdiv,
    dot_precision,
    layer_norm_backward,
    mask_arguments,
    rounded_weight,
    split_tokens,
)
from msformer_kernels.triton.table import launch_options

MOST_FOLDED = 128
"""Channels, key and value features of the folded form; half of it for float32 on `SMALL_SHARED`."""
SMALL_SHARED = ("sm_89", "sm_120")
"""Architectures with 99 KiB of shared memory for a program."""
FOLDED_PRECISIONS = ("tf32",)
"""Of float32 products, with which the folded form fits the registers."""


class State(NamedTuple):
    context: Tensor
    """``[B, heads, Dk / heads, Dv / heads]``, like everything here float32."""
    key_max: Tensor
    key_sum: Tensor
    key_tokens: Tensor
    """``[B, Dk, C]``; NaN if the forward was unfolded, as under another tf32 setting."""


def forward(call: Any) -> tuple[Tensor, ...]:
    x = call.x
    if x.shape[0] == 0:
        return tuple(t.zero_() for t in room(call))
    if not _folds(call):
        return unfolded.forward(call, attention)
    output, state = _folded_forward(call, kept_tokens(call.mask, x.shape[0], x.shape[1], x.device))
    return laid_like(output, x), *state, nothing_projected(call)


def backward(call: Any, saved: Any, grads: Any) -> tuple[Tensor, ...]:
    x, given = call.x, kernel_parameters(call)
    if x.shape[0] == 0:
        zeros = (x.new_zeros(0, dtype=torch.float32) if p is None else torch.zeros_like(p) for p in given)
        return room_like(x).zero_(), *zeros, *nothing_of_memory(x)
    if not _folds(call):
        return unfolded.backward(call, saved, grads, attention, layer_norm_backward)
    lengths = kept_tokens(call.mask, x.shape[0], x.shape[1], x.device)
    state = State(*(s.contiguous() for s in saved[:-1]))
    grad_context = grads.context
    if grad_context is not None:
        grad_context = grad_context.to(torch.float32).contiguous()
    grad_x, gradients = _folded_backward(call, grads.output, grad_context, state, lengths)
    return laid_like(grad_x, x), *placed(gradients, given, x), *nothing_of_memory(x)


def _folds(call: Any) -> bool:
    x = call.x
    if x.dtype == torch.float32 and dot_precision(x.dtype) not in FOLDED_PRECISIONS:
        return False
    keys, values = call.query_weight.shape[0], call.value_weight.shape[0]
    most = MOST_FOLDED // 2 if x.element_size() == 4 and architecture() in SMALL_SHARED else MOST_FOLDED
    return max(x.shape[2], keys, values) <= most


def _prepared(call: Any) -> Any:
    """The parameters contiguous and in the dtype of x, as the kernels take them; rounded those that tiles of tokens are
    multiplied with."""
    dtype, precision = call.x.dtype, dot_precision(call.x.dtype)
    given = zip(OPERATOR.parameters, OPERATOR.parameters_of(call), strict=True)
    found = {name: p.to(dtype).contiguous() for name, p in given if p is not None}
    found |= {name: rounded_weight(found[name], precision) for name in ("query_weight", "key_weight")}
    return call._replace(**found)


def _norm_arguments(call: Any) -> tuple[Tensor, Tensor, dict[str, bool]]:
    weight = call.x if call.norm_weight is None else call.norm_weight
    bias = call.x if call.norm_bias is None else call.norm_bias
    return weight, bias, {"NORM": call.norm_weight is not None, "NORM_BIAS": call.norm_bias is not None}


def _fold(call: Any, state: State, lengths: Tensor, make_context: bool) -> Tensor:
    """M `[B, Dk, C]` in the dtype of x; fills in the context first, if asked to."""
    x = call.x
    batch, heads, head_keys, head_values = state.context.shape
    channels = x.shape[2]
    folded = x.new_empty(batch, heads * head_keys, channels)
    columns = block_size(channels, most=32)
    self_attention_fold_kernel[(batch, heads, cdiv(head_keys, 16) * cdiv(channels, columns))](
        state.key_tokens,
        call.value_weight,
        lengths if call.value_bias is None else call.value_bias,
        call.output_weight,
        lengths,
        state.context,
        folded,
        channels,
        head_keys,
        head_values,
        MAKE_CONTEXT=make_context,
        VALUE_BIAS=call.value_bias is not None,
        BR=16,
        BC=block_size(channels),
        BO=columns,
        BV=block_size(head_values, most=32),
        PRECISION=dot_precision(x.dtype, exact=True),
        TOKEN_PRECISION=dot_precision(x.dtype),
        num_warps=4,
        **compile_options(),
    )
    return folded


def _folded_forward(call: Any, lengths: Tensor) -> tuple[Tensor, State]:
    call, x = _prepared(call), call.x
    batch, tokens, channels = x.shape
    heads, keys, values = call.num_heads, call.query_weight.shape[0], call.value_weight.shape[0]
    common: dict[str, Any] = {
        "OPERAND": DTYPES[x.dtype],
        "PRECISION": dot_precision(x.dtype),
        "BC": block_size(channels),
    }
    norm_weight, norm_bias, norm = _norm_arguments(call)
    mask, *mask_strides = mask_arguments(call.mask, lengths)

    blocks = launch_options("key_tokens", channels, x)
    features = block_size(keys, most=blocks.pop("BD"))
    tiles = cdiv(keys, features)
    splits, size = split_tokens(tokens, blocks["BN"], batch * tiles, x.device)
    maxima, sums = (x.new_empty(batch, splits, keys, dtype=torch.float32) for _ in range(2))
    partials = x.new_empty(batch, splits, keys, channels, dtype=torch.float32)
    self_attention_key_tokens_kernel[(batch, splits, tiles)](
        x,
        norm_weight,
        norm_bias,
        call.key_weight,
        mask,
        maxima,
        sums,
        partials,
        tokens,
        channels,
        keys,
        size,
        call.norm_eps,
        *x.stride(),
        *mask_strides,
        MASKED=call.mask is not None,
        BD=features,
        ALIGN=alignment(x),
        **norm,
        **common,
        **blocks,
    )
    key_tokens, key_max, key_sum = combine(maxima, sums, partials, lengths, 1, softmax=True)
    context = x.new_empty(batch, heads, keys // heads, values // heads, dtype=torch.float32)
    state = State(context, key_max, key_sum, key_tokens)
    folded = _fold(call, state, lengths, make_context=True)
    output = x.new_empty(batch, tokens, channels)
    if tokens:
        blocks = launch_options("self_output", channels, x)
        self_attention_output_kernel[(batch * cdiv(tokens, blocks["BN"]),)](
            x,
            norm_weight,
            norm_bias,
            call.query_weight,
            x if call.query_bias is None else call.query_bias,
            folded,
            x if call.output_bias is None else call.output_bias,
            output,
            tokens,
            channels,
            heads,
            keys // heads,
            call.norm_eps,
            *x.stride(),
            QUERY_BIAS=call.query_bias is not None,
            OUTPUT_BIAS=call.output_bias is not None,
            RESIDUAL=call.residual,
            BD=block_size(keys // heads),
            ALIGN=alignment(x),
            **norm,
            **common,
            **blocks,
        )
    return output, state


def _folded_backward(
    call: Any, grad_output: Tensor, grad_context: Tensor | None, state: State, lengths: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    call, x = _prepared(call), call.x
    batch, tokens, channels = x.shape
    heads, keys = call.num_heads, call.query_weight.shape[0]
    _, _, head_keys, head_values = state.context.shape
    common: dict[str, Any] = {
        "OPERAND": DTYPES[x.dtype],
        "PRECISION": dot_precision(x.dtype),
        "BC": block_size(channels),
    }
    norm_weight, norm_bias, norm = _norm_arguments(call)
    folded = _fold(call, state, lengths, make_context=False)

    blocks = launch_options("query_backward", channels, x)
    splits, size = split_tokens(tokens, blocks["BN"], batch * heads, x.device)
    grad_projected = x.new_empty(batch, tokens, 2 * keys)
    sizes = [keys * channels, channels]
    partials = x.new_empty(batch, splits, sum(sizes), dtype=torch.float32)
    self_attention_query_backward_kernel[(batch, splits, heads)](
        x,
        grad_output,
        norm_weight,
        norm_bias,
        call.query_weight,
        x if call.query_bias is None else call.query_bias,
        folded,
        grad_projected,
        partials,
        tokens,
        channels,
        head_keys,
        size,
        call.norm_eps,
        *x.stride(),
        *grad_output.stride(),
        QUERY_BIAS=call.query_bias is not None,
        BD=block_size(head_keys),
        ALIGN=alignment(x, grad_output),
        **norm,
        **common,
        **blocks,
    )
    by_image = partials.sum(1)
    grad_folded, grad_output_bias = by_image.split(sizes, 1)

    # sums over all tokens may overflow float16
    sum_dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    grad_context_sum = torch.empty_like(state.context)
    grad_key_tokens = torch.empty_like(state.key_tokens, dtype=sum_dtype)
    delta = torch.empty_like(state.key_max)
    self_attention_fold_backward_kernel[(batch, heads, cdiv(head_keys, 16))](
        grad_folded,
        state.context if grad_context is None else grad_context,
        state.key_tokens,
        call.value_weight,
        call.output_weight,
        grad_context_sum,
        grad_key_tokens,
        delta,
        by_image.shape[1],
        channels,
        head_keys,
        head_values,
        GRAD_CONTEXT=grad_context is not None,
        BR=16,
        BC=block_size(channels),
        BV=block_size(head_values, most=32),
        PRECISION=dot_precision(x.dtype, exact=True),
        TOKEN_PRECISION=dot_precision(x.dtype),
        num_warps=4,
        **compile_options(),
    )

    blocks = launch_options("token_backward", channels, x)
    splits, size = split_tokens(tokens, blocks["BN"], batch, x.device)
    grad_x = x.new_empty(x.shape)
    norm_partials = x.new_empty(batch * splits, 2, channels, dtype=torch.float32)
    mask, *mask_strides = mask_arguments(call.mask, lengths)
    self_attention_token_backward_kernel[(batch, splits)](
        x,
        grad_output,
        grad_projected,
        norm_weight,
        norm_bias,
        call.query_weight,
        call.key_weight,
        grad_key_tokens,
        delta,
        state.key_max,
        state.key_sum,
        mask,
        grad_x,
        norm_partials,
        tokens,
        channels,
        keys,
        size,
        call.norm_eps,
        *x.stride(),
        *grad_output.stride(),
        *mask_strides,
        RESIDUAL=call.residual,
        MASKED=call.mask is not None,
        ONE_TILE=tokens <= blocks["BN"],
        SUM_OPERAND=DTYPES[sum_dtype],
        ALIGN=alignment(x, grad_output),
        **norm,
        **common,
        **blocks,
    )
    grad_norm_weight, grad_norm_bias = norm_partials.sum(0)

    blocks = launch_options("weight_gradient", channels, x)
    tiles = cdiv(2 * keys, blocks["BD"])
    splits, size = split_tokens(tokens, blocks["BN"], batch * tiles, x.device)
    partials = x.new_empty(batch * splits, 2 * keys * (channels + 1), dtype=torch.float32)
    self_attention_weight_gradient_kernel[(batch, splits, tiles)](
        x,
        grad_projected,
        norm_weight,
        norm_bias,
        partials,
        tokens,
        channels,
        2 * keys,
        size,
        call.norm_eps,
        *x.stride(),
        ALIGN=alignment(x),
        **norm,
        **common,
        **blocks,
    )
    weight_size = keys * channels
    grad_query_weight, grad_key_weight, grad_query_bias, _ = partials.sum(0).split(
        [weight_size, weight_size, keys, keys]
    )

    # W_o, W_v and b_v: small products, summed over images
    by_head = grad_folded.unflatten(1, (heads, head_keys, channels))
    grad_output_weight = torch.einsum("bhdc,bhdv->chv", by_head, state.context)
    key_tokens = state.key_tokens.unflatten(1, (heads, head_keys))
    grad_value_weight = torch.einsum("bhdv,bhdc->hvc", grad_context_sum, key_tokens)
    kept = (lengths > 0).view(batch, 1, 1)
    gradients = (
        grad_query_weight,
        grad_query_bias,
        grad_key_weight,
        grad_value_weight,
        (grad_context_sum.sum(2) * kept).sum(0),
        grad_output_weight,
        grad_output_bias.sum(0),
        grad_norm_weight,
        grad_norm_bias,
    )
    return grad_x, gradients
