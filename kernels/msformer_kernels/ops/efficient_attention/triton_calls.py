"""Efficient attention on query, key, value through the Triton kernels (triton_kernels.py, triton_backward.py).

Tensors may have any strides. The context and the statistics of the key softmax are float32.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from msformer_kernels.core.layout import room_like
from msformer_kernels.ops.efficient_attention.memory import joined, separated
from msformer_kernels.ops.efficient_attention.spec import OPERATOR
from msformer_kernels.ops.efficient_attention.triton_backward import (
    attention_combine_gradient_kernel,
    attention_context_gradient_kernel,
    attention_key_gradient_kernel,
    attention_query_gradient_kernel,
)
from msformer_kernels.ops.efficient_attention.triton_kernels import (
    attention_combine_kernel,
    attention_context_kernel,
    attention_output_kernel,
)
from msformer_kernels.triton.device import compile_options
from msformer_kernels.triton.launch import alignment, block_size, cdiv, dot_precision, mask_arguments, split_tokens
from msformer_kernels.triton.table import launch_options


def _blocks(kernel: str, key_channels: int, value: Tensor) -> dict[str, int]:
    """Tiles of at most 64 features, so that products of three tf32 terms need no more registers than there are."""
    features, values = (block_size(size, most=64) for size in (key_channels, value.shape[3]))
    return {"BD": features, "BV": values, **launch_options(kernel, key_channels, value)}


def kept_tokens(mask: Tensor | None, batch: int, tokens: int, device: torch.device) -> Tensor:
    """`[B]`: how many tokens are kept."""
    if mask is None:
        return torch.full((batch,), tokens, dtype=torch.int32, device=device)
    return mask.sum(1, dtype=torch.int32)


def combine(
    maxima: Tensor, sums: Tensor, partials: Tensor, lengths: Tensor, heads: int, softmax: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds the splits of ``[groups, splits, D, V]``; -> result `[groups, D, V]`, maximum and sum `[groups, D]`."""
    groups, splits, key_channels, value_channels = partials.shape
    result = partials.new_empty(groups, key_channels, value_channels)
    largest, total = (partials.new_empty(groups, key_channels) for _ in range(2))
    attention_combine_kernel[(groups, key_channels)](
        maxima,
        sums,
        partials,
        lengths,
        result,
        largest,
        total,
        heads,
        splits,
        key_channels,
        value_channels,
        SOFTMAX=softmax,
        BS=16,
        BV=block_size(value_channels),
        num_warps=4,
        **compile_options(),
    )
    return result, largest, total


def combine_gradient(partials: Tensor, added: Tensor | None, context: Tensor) -> tuple[Tensor, Tensor]:
    """-> the sum over splits of ``[groups, splits, D, V]`` (plus `added`), and <context, sum> of each key feature."""
    groups, splits, key_channels, value_channels = partials.shape
    total = partials.new_empty(groups, key_channels, value_channels)
    delta = partials.new_empty(groups, key_channels)
    attention_combine_gradient_kernel[(groups, key_channels)](
        partials,
        context if added is None else added,
        context,
        total,
        delta,
        splits,
        key_channels,
        value_channels,
        ADDED=added is not None,
        BS=16,
        BV=block_size(value_channels),
        num_warps=4,
        **compile_options(),
    )
    return total, delta


@dataclass(frozen=True)
class Rules:
    """How queries and keys are normalised and scaled."""

    query_scale: float = 1.0
    key_scale: float = 1.0
    output_scale: float = 1.0
    normalize_query: bool = True
    normalization: str = "softmax"

    @property
    def softmax(self) -> bool:
        return self.normalization == "softmax"

    @property
    def query_softmax(self) -> bool:
        return self.softmax and self.normalize_query

    @property
    def query_by_length(self) -> bool:
        return self.normalize_query and not self.softmax


PLAIN = Rules()
_OPTIONS = itemgetter(*OPERATOR.positions([field.name for field in fields(Rules)]))


def _rules(call: Any) -> Rules:
    return Rules(*_OPTIONS(call))


def make_context(
    key: Tensor, value: Tensor, mask: Tensor | None, lengths: Tensor, rules: Rules
) -> tuple[Tensor, Tensor, Tensor]:
    """-> context `[B * heads, Dk, Dv]`, key_max and key_sum `[B * heads, Dk]`."""
    batch, heads, tokens, key_channels = key.shape
    value_channels, groups = value.shape[3], batch * heads
    blocks = _blocks("attention_reduction", key_channels, value)
    tiles = cdiv(key_channels, blocks["BD"]) * cdiv(value_channels, blocks["BV"])
    splits, size = split_tokens(tokens, blocks["BN"], tiles * groups, key.device)
    maxima, sums = (key.new_empty(groups, splits, key_channels, dtype=torch.float32) for _ in range(2))
    partials = key.new_empty(groups, splits, key_channels, value_channels, dtype=torch.float32)
    mask_bytes, *mask_strides = mask_arguments(mask, lengths)
    attention_context_kernel[(groups, splits, tiles)](
        key,
        value,
        mask_bytes,
        maxima,
        sums,
        partials,
        heads,
        tokens,
        key_channels,
        value_channels,
        size,
        rules.key_scale,
        *key.stride(),
        *value.stride(),
        *mask_strides,
        SOFTMAX=rules.softmax,
        MASKED=mask is not None,
        ALIGN=alignment(key, value),
        PRECISION=dot_precision(key.dtype, exact=True),
        **blocks,
    )
    return combine(maxima, sums, partials, lengths, heads, rules.softmax)


def write_output(query: Tensor, context: Tensor, lengths: Tensor, output: Tensor, rules: Rules) -> None:
    """Fills output `[B, heads, N, V]`, of any strides."""
    batch, heads, tokens, key_channels = query.shape
    if tokens == 0:
        return
    blocks = _blocks("attention_output", key_channels, output)
    attention_output_kernel[(batch * heads * cdiv(tokens, blocks["BN"]), cdiv(output.shape[3], blocks["BV"]))](
        query,
        context,
        lengths,
        output,
        heads,
        tokens,
        key_channels,
        output.shape[3],
        rules.query_scale,
        rules.output_scale,
        *query.stride(),
        *output.stride(),
        SOFTMAX=rules.query_softmax,
        BY_LENGTH=rules.query_by_length,
        ALIGN=alignment(query, output),
        PRECISION=dot_precision(query.dtype),
        **blocks,
    )


def query_gradients(
    grad_output: Tensor,
    grad_context: Tensor | None,
    query: Tensor,
    context: Tensor,
    lengths: Tensor,
    grad_query: Tensor,
    rules: Rules,
) -> tuple[Tensor, Tensor]:
    """Fills grad_query; -> gradient of the context, `[B * heads, Dk, Dv]`, and its product with the context, by
    rows."""
    batch, heads, tokens, key_channels = query.shape
    value_channels, groups = grad_output.shape[3], batch * heads
    options = {"SOFTMAX": rules.query_softmax, "PRECISION": dot_precision(query.dtype)}
    shift, factor = (query.new_empty(groups, tokens, dtype=torch.float32) for _ in range(2))
    blocks = _blocks("attention_query_gradient", key_channels, grad_output)
    if tokens:
        attention_query_gradient_kernel[(groups * cdiv(tokens, blocks["BN"]),)](
            query,
            grad_output,
            context,
            lengths,
            grad_query,
            shift,
            factor,
            heads,
            tokens,
            key_channels,
            value_channels,
            rules.query_scale,
            rules.output_scale,
            *query.stride(),
            *grad_output.stride(),
            *grad_query.stride(),
            BY_LENGTH=rules.query_by_length,
            ALIGN=alignment(query, grad_output, grad_query),
            **options,
            **blocks,
        )
    blocks = _blocks("attention_reduction", key_channels, grad_output)
    tiles = cdiv(key_channels, blocks["BD"]) * cdiv(value_channels, blocks["BV"])
    splits, size = split_tokens(tokens, blocks["BN"], tiles * groups, query.device)
    partials = query.new_empty(groups, splits, key_channels, value_channels, dtype=torch.float32)
    attention_context_gradient_kernel[(groups, splits, tiles)](
        query,
        grad_output,
        shift,
        factor,
        partials,
        heads,
        tokens,
        key_channels,
        value_channels,
        size,
        rules.query_scale,
        rules.output_scale,
        *query.stride(),
        *grad_output.stride(),
        ALIGN=alignment(query, grad_output),
        **options,
        **blocks,
    )
    added = None if grad_context is None else grad_context.to(torch.float32).contiguous()
    return combine_gradient(partials, added, context)


def key_gradients(
    grad_context: Tensor,
    delta: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_max: Tensor,
    key_sum: Tensor,
    grads: tuple[Tensor, Tensor],
    rules: Rules,
) -> None:
    """Fills the gradients of key and value."""
    batch, heads, tokens, key_channels = key.shape
    if tokens == 0:
        return
    blocks = _blocks("attention_output", key_channels, value)
    mask_bytes, *mask_strides = mask_arguments(mask, key_max)
    tiles = cdiv(key_channels, blocks["BD"]) + cdiv(value.shape[3], blocks["BV"])
    attention_key_gradient_kernel[(batch * heads * cdiv(tokens, blocks["BN"]), tiles)](
        key,
        value,
        mask_bytes,
        key_max,
        key_sum,
        grad_context,
        delta,
        *grads,
        heads,
        tokens,
        key_channels,
        value.shape[3],
        rules.key_scale,
        *key.stride(),
        *value.stride(),
        *mask_strides,
        *grads[0].stride(),
        *grads[1].stride(),
        SOFTMAX=rules.softmax,
        MASKED=mask is not None,
        ONE_TILE=tokens <= blocks["BN"],
        ALIGN=alignment(key, value, *grads),
        PRECISION=dot_precision(key.dtype),
        **blocks,
    )


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, output: Tensor, rules: Rules = PLAIN
) -> tuple[Tensor, Tensor, Tensor]:
    """Fills the output; -> context, key_max and key_sum."""
    batch, heads, tokens, key_channels = key.shape
    lengths = kept_tokens(mask, batch, tokens, query.device)
    context, key_max, key_sum = make_context(key, value, mask, lengths, rules)
    write_output(query, context, lengths, output, rules)
    shape = batch, heads, key_channels
    return context.view(*shape, value.shape[3]), key_max.view(shape), key_sum.view(shape)


def attend_context(query: Tensor, context: Tensor, output: Tensor) -> None:
    """Fills the output from a context that is known."""
    write_output(query, context.contiguous(), context, output, PLAIN)  # lengths do not count in a softmax


def attend_backward(
    grad_output: Tensor,
    grad_context: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    state: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
    rules: Rules = PLAIN,
) -> None:
    """Fills the gradients of query, key and value. `state` is what `attend` returned."""
    lengths = kept_tokens(mask, key.shape[0], key.shape[2], query.device)
    context, key_max, key_sum = (x.contiguous() for x in state)
    total, delta = query_gradients(grad_output, grad_context, query, context, lengths, grads[0], rules)
    key_gradients(total, delta, key, value, mask, key_max, key_sum, grads[1:], rules)


def forward(call: Any) -> tuple[Tensor, ...]:
    call = joined(call)
    query, key, value = call.query, call.key, call.value
    batch, heads, _, key_channels = key.shape
    output = room_like(query, value.shape[3])
    shape = batch, heads, key_channels, value.shape[3]
    if min(shape) == 0:
        zeros = query.new_zeros(shape, dtype=torch.float32)
        return output.zero_(), zeros, zeros.new_zeros(shape[:3]), zeros.new_zeros(shape[:3])
    return output, *attend(query, key, value, call.mask, output, _rules(call))


def backward(call: Any, saved: Any, grads: Any) -> tuple[Tensor, ...]:
    given, call = call, joined(call)
    query, key, value = call.query, call.key, call.value
    found = room_like(query), room_like(key), room_like(value)
    if saved.context.numel() == 0:
        return separated(given, *(x.zero_() for x in found))
    attend_backward(grads.output, grads.context, query, key, value, call.mask, saved, found, _rules(call))
    return separated(given, *found)
