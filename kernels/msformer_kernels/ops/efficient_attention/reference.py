"""Efficient attention in plain PyTorch: the specification of the operator.

    output = output_scale * rho_q(query) (rho_k(key)^T value)

rho_q is a softmax over the features of one query, rho_k a softmax over the tokens of one key feature (Shen et al.,
"Efficient Attention: Attention with Linear Complexities", WACV 2021, eq. 5-7); or both divide by the square root of the
number of tokens ("scaling"). With "relu" both are ReLU, and each query is divided by its product with the sum of the
keys (Cai et al., "EfficientViT: Lightweight Multi-Scale Attention for High-Resolution Dense Prediction", ICCV 2023,
eq. 2-3). bfloat16 and float16 are computed in float32 and rounded at the end, for the softmax over N tokens has mean
probability 1 / N, and sums of N keys exceed float16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msformer_kernels.core.precision import arithmetic_dtype, autocast_enabled

NORMALIZATIONS = ("softmax", "scaling", "relu")


def efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    memory_key: Tensor | None = None,
    memory_value: Tensor | None = None,
    query_scale: float = 1.0,
    key_scale: float = 1.0,
    output_scale: float = 1.0,
    normalize_query: bool = True,
    normalization: str = "softmax",
    eps: float = 1e-15,
) -> tuple[Tensor, Tensor]:
    """See `msformer_kernels.ops.efficient_attention`."""
    device_type = query.device.type
    if autocast_enabled(device_type) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            return efficient_attention(
                query.to(dtype),
                key.to(dtype),
                value.to(dtype),
                mask=mask,
                memory_key=None if memory_key is None else memory_key.to(dtype),
                memory_value=None if memory_value is None else memory_value.to(dtype),
                query_scale=query_scale,
                key_scale=key_scale,
                output_scale=output_scale,
                normalize_query=normalize_query,
                normalization=normalization,
                eps=eps,
            )
    dtype = query.dtype
    key, value, mask = with_memory(key, value, mask, memory_key, memory_value)
    wide = arithmetic_dtype(dtype)
    query, key, value = query.to(wide) * query_scale, key.to(wide) * key_scale, value.to(wide)
    masked = None if mask is None else ~mask[:, None, :, None]
    if masked is not None:
        value = value.masked_fill(masked, 0)
    if normalization == "softmax":
        key = _softmax_over_tokens(key, masked)
        query = query.softmax(-1) if normalize_query else query
    elif normalization == "relu":
        key, query = key.relu(), query.relu()
        key = key if masked is None else key.masked_fill(masked, 0)
        query = query / (query @ key.sum(-2).unsqueeze(-1) + eps) if normalize_query else query
    else:
        kept = torch.tensor(key.shape[2], device=key.device) if mask is None else mask.sum(-1)[:, None, None, None]
        length = kept.to(wide).clamp(min=1).sqrt()
        key = (key if masked is None else key.masked_fill(masked, 0)) / length
        query = query / length if normalize_query else query
    context = key.transpose(-1, -2) @ value
    return (output_scale * (query @ context)).to(dtype), context


def with_memory(
    key: Tensor, value: Tensor, mask: Tensor | None, memory_key: Tensor | None, memory_value: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and mask with the memory in front, if there is any."""
    if memory_key is None or memory_value is None:
        return key, value, mask
    batch, tokens = key.shape[0], memory_key.shape[1]
    key = torch.cat((memory_key.to(key.dtype).expand(batch, -1, -1, -1), key), 2)
    value = torch.cat((memory_value.to(value.dtype).expand(batch, -1, -1, -1), value), 2)
    return key, value, None if mask is None else torch.nn.functional.pad(mask, (tokens, 0), value=True)


def _softmax_over_tokens(key: Tensor, masked: Tensor | None) -> Tensor:
    """Softmax over dim -2 of the tokens that are kept; zeros where none is."""
    if masked is None:
        return key.softmax(-2)
    # an image without tokens would give 0 / 0: its logits are set to 0 and its weights cleared afterwards
    none_kept = masked.all(-2, keepdim=True)
    logits = key.masked_fill(masked, float("-inf")).masked_fill(none_kept, 0)
    return logits.softmax(-2).masked_fill(masked, 0)
