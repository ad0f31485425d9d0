"""Efficient self-attention through Triton kernels: which form a shape gets, and its launches.

Up to 128 channels and key features, in a dtype that tensor cores take, the folded form (triton_kernels.py). Wider,
its tiles no longer fit the registers, nor do they in full float32, of which a product takes three terms (measured by
`python -m benchmarks.ahead_of_time`); then queries, keys and values are made by the vendor's matrix products and go
through the kernels of efficient_attention.

Tensors are validated by the caller. The key bias is not needed: the softmax over tokens cancels it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from msformer_kernels.efficient_attention.triton_calls import (
    Rules,
    combine,
    kept_tokens,
    key_gradients,
    make_context,
    query_gradients,
    write_output,
)
from msformer_kernels.efficient_self_attention.triton_kernels import (
    fold_backward_kernel,
    fold_kernel,
    key_tokens_kernel,
    output_kernel,
    query_backward_kernel,
    token_backward_kernel,
    weight_gradient_kernel,
)
from msformer_kernels.triton_common import (
    DTYPES,
    alignment,
    block_size,
    cdiv,
    dot_precision,
    layer_norm_backward,
    mask_arguments,
    placed,
    split_tokens,
)
from msformer_kernels.triton_table import COMPILED, architecture, launch_options

MOST_FOLDED = 128
"""Channels, key and value features of the folded form; half of it for float32 where shared memory is small (sm_89)."""
_PLAIN = Rules()


class Parameters(NamedTuple):
    query_weight: Tensor
    query_bias: Tensor | None
    key_weight: Tensor
    value_weight: Tensor
    value_bias: Tensor | None
    output_weight: Tensor
    output_bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None


class Options(NamedTuple):
    num_heads: int
    norm_eps: float
    residual: bool
    mask: Tensor | None


class State(NamedTuple):
    context: Tensor
    """``[B, heads, Dk / heads, Dv / heads]``, like everything here float32."""
    key_max: Tensor
    key_sum: Tensor
    key_tokens: Tensor
    """``[B, Dk, C]``, zeros in the unfolded form."""


def forward(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor | None,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    output_weight: Tensor,
    output_bias: Tensor | None,
    num_heads: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    residual: bool,
    mask: Tensor | None,
) -> tuple[Tensor, ...]:
    """-> output `[B, N, C]` and the fields of `State`."""
    projections = query_weight, query_bias, key_weight, value_weight, value_bias, output_weight, output_bias
    given = Parameters(*projections, norm_weight, norm_bias)
    options = Options(num_heads, norm_eps, residual, mask)
    batch, tokens, _ = x.shape
    lengths = kept_tokens(mask, batch, tokens, x.device)
    if min(batch, x.shape[2], query_weight.shape[0], value_weight.shape[0]) == 0:
        return _nothing(x, given, options)
    make = _folded_forward if _folds(x, given) else _unfolded_forward
    output, state = make(x, given, options, lengths)
    return output, *state


def backward(
    grad_output: Tensor,
    grad_context: Tensor | None,
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor | None,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None,
    output_weight: Tensor,
    context: Tensor,
    key_max: Tensor,
    key_sum: Tensor,
    key_tokens: Tensor,
    num_heads: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    residual: bool,
    mask: Tensor | None,
) -> tuple[Tensor, ...]:
    """-> gradients of x and of query_weight, query_bias, key_weight, value_weight, value_bias, output_weight,
    output_bias, norm_weight and norm_bias; zero-size for an absent one, but always that of an output bias `[C]`."""
    any_output_bias = output_weight.new_empty(output_weight.shape[0])
    projections = query_weight, query_bias, key_weight, value_weight, value_bias, output_weight, any_output_bias
    given = Parameters(*projections, norm_weight, norm_bias)
    options = Options(num_heads, norm_eps, residual, mask)
    if min(x.shape[0], x.shape[2], query_weight.shape[0], value_weight.shape[0]) == 0:
        return _no_gradients(x, given)
    lengths = kept_tokens(mask, x.shape[0], x.shape[1], x.device)
    state = State(*(s.contiguous() for s in (context, key_max, key_sum, key_tokens)))
    if grad_context is not None:
        grad_context = grad_context.to(torch.float32).contiguous()
    make = _folded_backward if _folds(x, given) else _unfolded_backward
    grad_x, gradients = make(grad_output, grad_context, x, given, options, state, lengths)
    return grad_x, *placed(gradients, given, x)


def _folds(x: Tensor, given: Parameters) -> bool:
    if x.dtype == torch.float32 and dot_precision(x.dtype) != "tf32":
        return False
    keys, values = given.query_weight.shape[0], given.value_weight.shape[0]
    most = MOST_FOLDED // 2 if x.element_size() == 4 and architecture() == "sm_89" else MOST_FOLDED
    return max(x.shape[2], keys, values) <= most


def _nothing(x: Tensor, given: Parameters, options: Options) -> tuple[Tensor, ...]:
    """For a batch without images."""
    batch, _, channels = x.shape
    keys, values, heads = given.query_weight.shape[0], given.value_weight.shape[0], options.num_heads
    zeros = x.new_zeros(batch, keys, channels, dtype=torch.float32)
    context = zeros.new_zeros(batch, heads, keys // heads, values // heads)
    return x.new_zeros(x.shape), context, zeros.new_zeros(batch, keys), zeros.new_zeros(batch, keys), zeros


def _no_gradients(x: Tensor, given: Parameters) -> tuple[Tensor, ...]:
    zeros = (x.new_zeros(0, dtype=torch.float32) if p is None else torch.zeros_like(p) for p in given)
    return x.new_zeros(x.shape), *zeros


def _prepared(given: Parameters, x: Tensor) -> Parameters:
    """Contiguous and in the dtype of x, as the kernels take them."""
    return Parameters._make(None if p is None else p.to(x.dtype).contiguous() for p in given)


def _norm_arguments(given: Parameters, x: Tensor) -> tuple[Tensor, Tensor, dict[str, bool]]:
    weight = x if given.norm_weight is None else given.norm_weight
    bias = x if given.norm_bias is None else given.norm_bias
    return weight, bias, {"NORM": given.norm_weight is not None, "NORM_BIAS": given.norm_bias is not None}


def _fold(x: Tensor, given: Parameters, state: State, lengths: Tensor, make_context: bool) -> Tensor:
    """M `[B, Dk, C]` in the dtype of x; fills in the context first, if asked to."""
    batch, heads, head_keys, head_values = state.context.shape
    channels = x.shape[2]
    folded = x.new_empty(batch, heads * head_keys, channels)
    fold_kernel[(batch, heads, cdiv(head_keys, 16))](
        state.key_tokens,
        given.value_weight,
        lengths if given.value_bias is None else given.value_bias,
        given.output_weight,
        lengths,
        state.context,
        folded,
        channels,
        head_keys,
        head_values,
        MAKE_CONTEXT=make_context,
        VALUE_BIAS=given.value_bias is not None,
        BR=16,
        BC=block_size(channels),
        BV=block_size(head_values, most=32),
        PRECISION=dot_precision(x.dtype, exact=True),
        num_warps=4,
        **COMPILED,
    )
    return folded


def _folded_forward(x: Tensor, given: Parameters, options: Options, lengths: Tensor) -> tuple[Tensor, State]:
    given = _prepared(given, x)
    batch, tokens, channels = x.shape
    heads, keys, values = options.num_heads, given.query_weight.shape[0], given.value_weight.shape[0]
    common: dict[str, Any] = {
        "OPERAND": DTYPES[x.dtype],
        "PRECISION": dot_precision(x.dtype),
        "BC": block_size(channels),
    }
    norm_weight, norm_bias, norm = _norm_arguments(given, x)
    mask, *mask_strides = mask_arguments(options.mask, lengths)

    blocks = launch_options("key_tokens", channels, x)
    features = block_size(keys, most=blocks.pop("BD"))
    tiles = cdiv(keys, features)
    splits, size = split_tokens(tokens, blocks["BN"], batch * tiles, x.device)
    maxima, sums = (x.new_empty(batch, splits, keys, dtype=torch.float32) for _ in range(2))
    partials = x.new_empty(batch, splits, keys, channels, dtype=torch.float32)
    key_tokens_kernel[(batch, splits, tiles)](
        x,
        norm_weight,
        norm_bias,
        given.key_weight,
        mask,
        maxima,
        sums,
        partials,
        tokens,
        channels,
        keys,
        size,
        options.norm_eps,
        *x.stride(),
        *mask_strides,
        MASKED=options.mask is not None,
        BD=features,
        ALIGN=alignment(x),
        **norm,
        **common,
        **blocks,
    )
    key_tokens, key_max, key_sum = combine(maxima, sums, partials, lengths, 1, softmax=True)
    context = x.new_empty(batch, heads, keys // heads, values // heads, dtype=torch.float32)
    state = State(context, key_max, key_sum, key_tokens)
    folded = _fold(x, given, state, lengths, make_context=True)
    output = x.new_empty(batch, tokens, channels)
    if tokens:
        blocks = launch_options("self_output", channels, x)
        output_kernel[(batch * cdiv(tokens, blocks["BN"]),)](
            x,
            norm_weight,
            norm_bias,
            given.query_weight,
            x if given.query_bias is None else given.query_bias,
            folded,
            x if given.output_bias is None else given.output_bias,
            output,
            tokens,
            channels,
            heads,
            keys // heads,
            options.norm_eps,
            *x.stride(),
            QUERY_BIAS=given.query_bias is not None,
            OUTPUT_BIAS=given.output_bias is not None,
            RESIDUAL=options.residual,
            BD=block_size(keys // heads),
            ALIGN=alignment(x),
            **norm,
            **common,
            **blocks,
        )
    return output, state


def _folded_backward(
    grad_output: Tensor,
    grad_context: Tensor | None,
    x: Tensor,
    given: Parameters,
    options: Options,
    state: State,
    lengths: Tensor,
) -> tuple[Tensor, Parameters]:
    given = _prepared(given, x)
    batch, tokens, channels = x.shape
    heads, keys = options.num_heads, given.query_weight.shape[0]
    _, _, head_keys, head_values = state.context.shape
    common: dict[str, Any] = {
        "OPERAND": DTYPES[x.dtype],
        "PRECISION": dot_precision(x.dtype),
        "BC": block_size(channels),
    }
    norm_weight, norm_bias, norm = _norm_arguments(given, x)
    folded = _fold(x, given, state, lengths, make_context=False)

    blocks = launch_options("query_backward", channels, x)
    splits, size = split_tokens(tokens, blocks["BN"], batch * heads, x.device)
    grad_projected = x.new_empty(batch, tokens, 2 * keys)
    sizes = [keys * channels, channels]
    partials = x.new_empty(batch, splits, sum(sizes), dtype=torch.float32)
    query_backward_kernel[(batch, splits, heads)](
        x,
        grad_output,
        norm_weight,
        norm_bias,
        given.query_weight,
        x if given.query_bias is None else given.query_bias,
        folded,
        grad_projected,
        partials,
        tokens,
        channels,
        head_keys,
        size,
        options.norm_eps,
        *x.stride(),
        *grad_output.stride(),
        QUERY_BIAS=given.query_bias is not None,
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
    fold_backward_kernel[(batch, heads, cdiv(head_keys, 16))](
        grad_folded,
        state.context if grad_context is None else grad_context,
        state.key_tokens,
        given.value_weight,
        given.output_weight,
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
        num_warps=4,
        **COMPILED,
    )

    blocks = launch_options("token_backward", channels, x)
    splits, size = split_tokens(tokens, blocks["BN"], batch, x.device)
    grad_x = x.new_empty(x.shape)
    norm_partials = x.new_empty(batch * splits, 2, channels, dtype=torch.float32)
    mask, *mask_strides = mask_arguments(options.mask, lengths)
    token_backward_kernel[(batch, splits)](
        x,
        grad_output,
        grad_projected,
        norm_weight,
        norm_bias,
        given.query_weight,
        given.key_weight,
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
        options.norm_eps,
        *x.stride(),
        *grad_output.stride(),
        *mask_strides,
        RESIDUAL=options.residual,
        MASKED=options.mask is not None,
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
    weight_gradient_kernel[(batch, splits, tiles)](
        x,
        grad_projected,
        norm_weight,
        norm_bias,
        partials,
        tokens,
        channels,
        2 * keys,
        size,
        options.norm_eps,
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
    gradients = Parameters(
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


def _normed(x: Tensor, given: Parameters, eps: float) -> Tensor:
    if given.norm_weight is None:
        return x
    bias = None if given.norm_bias is None else given.norm_bias.to(x.dtype)
    return F.layer_norm(x, x.shape[-1:], given.norm_weight.to(x.dtype), bias, eps)


def _project(tokens: Tensor, weight: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """`[B, N, C]` -> `[B, heads, N, D / heads]`, a view of contiguous `[B, N, D]`."""
    out = F.linear(tokens, weight.to(tokens.dtype), None if bias is None else bias.to(tokens.dtype))
    return out.unflatten(-1, (heads, out.shape[-1] // heads)).transpose(1, 2)


def _attended(query: Tensor, context: Tensor, lengths: Tensor) -> Tensor:
    """`[B, N, Dv]`: all heads side by side."""
    batch, heads, tokens, _ = query.shape
    output = query.new_empty(batch, tokens, heads, context.shape[-1])
    write_output(query, context, lengths, output.transpose(1, 2), _PLAIN)
    return output.flatten(2)


def _unfolded_forward(x: Tensor, given: Parameters, options: Options, lengths: Tensor) -> tuple[Tensor, State]:
    tokens, heads = _normed(x, given, options.norm_eps), options.num_heads
    query = _project(tokens, given.query_weight, given.query_bias, heads)
    key = _project(tokens, given.key_weight, None, heads)
    value = _project(tokens, given.value_weight, given.value_bias, heads)
    context, key_max, key_sum = make_context(key, value, options.mask, lengths, _PLAIN)
    attended = _attended(query, context, lengths)
    bias = None if given.output_bias is None else given.output_bias.to(x.dtype)
    output = F.linear(attended, given.output_weight.to(x.dtype), bias)
    if options.residual:
        output += x
    batch, keys = x.shape[0], given.query_weight.shape[0]
    key_tokens = context.new_zeros(batch, keys, x.shape[2])
    context = context.view(batch, heads, keys // heads, value.shape[3])
    return output, State(context, key_max.view(batch, keys), key_sum.view(batch, keys), key_tokens)


def _unfolded_backward(
    grad_output: Tensor,
    grad_context: Tensor | None,
    x: Tensor,
    given: Parameters,
    options: Options,
    state: State,
    lengths: Tensor,
) -> tuple[Tensor, Parameters]:
    dtype, heads = x.dtype, options.num_heads
    tokens = _normed(x, given, options.norm_eps)
    query = _project(tokens, given.query_weight, given.query_bias, heads)
    key = _project(tokens, given.key_weight, None, heads)
    value = _project(tokens, given.value_weight, given.value_bias, heads)
    attended = _attended(query, state.context, lengths)
    grad_attended = grad_output @ given.output_weight.to(dtype)
    # gradients of queries, keys and values side by side, so that each product with them is one
    widths = [query.shape[3] * heads, key.shape[3] * heads, value.shape[3] * heads]
    grad_projected = x.new_empty(*x.shape[:2], sum(widths))
    grads = [g.unflatten(-1, (heads, -1)).transpose(1, 2) for g in grad_projected.split(widths, -1)]
    by_head = grad_attended.unflatten(-1, (heads, -1)).transpose(1, 2)
    total, delta = query_gradients(by_head, grad_context, query, state.context, lengths, grads[0], _PLAIN)
    key_gradients(total, delta, key, value, options.mask, state.key_max, state.key_sum, (grads[1], grads[2]), _PLAIN)
    weight = torch.cat([given.query_weight, given.key_weight, given.value_weight]).to(dtype)
    grad_tokens = grad_projected @ weight
    flat = grad_projected.flatten(0, 1)
    grad_weights = (flat.t() @ tokens.flatten(0, 1)).split(widths)
    grad_biases = flat.sum(0, dtype=torch.float32).split(widths)
    flat_grad = grad_output.flatten(0, 1)
    grad_norm_weight = grad_norm_bias = delta
    if given.norm_weight is not None:
        added = grad_output if options.residual else None
        grad_x, grad_norm_weight, grad_norm_bias = layer_norm_backward(
            grad_tokens, x, given.norm_weight, options.norm_eps, added
        )
    else:
        grad_x = grad_tokens + grad_output if options.residual else grad_tokens
    gradients = Parameters(
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
    return grad_x, gradients
