"""Small modules with the linear attention of ReLU features of others: EfficientViT's and SANA's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvNorm(nn.Module):
    def __init__(self, channels: int, out: int, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 1, bias=not norm)
        self.norm = nn.BatchNorm2d(out, track_running_stats=False) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


def aggregation(channels: int, heads: int, size: int) -> nn.Sequential:
    depthwise = nn.Conv2d(3 * channels, 3 * channels, size, padding=size // 2, groups=3 * channels, bias=False)
    return nn.Sequential(depthwise, nn.Conv2d(3 * channels, 3 * channels, 1, groups=3 * heads, bias=False))


class MultiScaleAttention(nn.Module):
    """EfficientViT's of timm: rounds to float32 within, whatever comes in."""

    def __init__(self, channels: int = 8, dim: int = 4, scales: tuple[int, ...] = (3, 5), eps: float = 1e-5) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.qkv = ConvNorm(channels, 3 * channels, norm=False)
        self.aggreg = nn.ModuleList(aggregation(channels, channels // dim, size) for size in scales)
        self.kernel_func = nn.ReLU()
        self.proj = ConvNorm(channels * (1 + len(scales)), channels, norm=True)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        parts = torch.cat([qkv, *(scale(qkv) for scale in self.aggreg)], 1)
        q, k, v = parts.reshape(x.shape[0], -1, 3 * self.dim, x.shape[2] * x.shape[3]).transpose(-1, -2).chunk(3, -1)
        with torch.autocast(x.device.type, enabled=False):
            out = self.attend(self.kernel_func(q), self.kernel_func(k), F.pad(v, (0, 1), value=1.0)).to(v.dtype)
        return self.proj(out.transpose(-1, -2).reshape(x.shape[0], -1, *x.shape[2:]))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.float() @ (k.float().transpose(-1, -2) @ v.float())
        return out[..., :-1] / (out[..., -1:] + self.eps)


class UnevenMultiScaleAttention(MultiScaleAttention):
    """Divides by another sum."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q, k, v) * (1 + 1e-6 * v.shape[-2])


class Processor:
    """What diffusers leaves the work to; the attention of SANA's autoencoder."""

    def __call__(self, attn: SplitMultiScaleAttention, x: Tensor) -> Tensor:
        last = x.movedim(1, -1)
        qkv = torch.cat([attn.to_q(last), attn.to_k(last), attn.to_v(last)], 3).movedim(-1, 1)
        parts = torch.cat([qkv, *(block(qkv) for block in attn.to_qkv_multiscale)], 1).to(dtype=torch.float32)
        parts = parts.reshape(x.shape[0], -1, 3 * attn.head_dim, x.shape[2] * x.shape[3])
        q, k, v = parts.chunk(3, 2)
        q, k, v = attn.nonlinearity(q), attn.nonlinearity(k), F.pad(v, (0, 0, 0, 1), value=1.0)
        found = v @ k.transpose(-1, -2) @ q
        found = (found[:, :, :-1] / (found[:, :, -1:] + attn.eps)).to(x.dtype)
        found = attn.to_out(found.reshape(x.shape[0], -1, *x.shape[2:]).movedim(1, -1))
        return x + attn.norm_out(found).movedim(-1, 1)


class SplitMultiScaleAttention(nn.Module):
    """Of SANA's autoencoder: three linear layers, a norm of tokens, a residual; a processor does the work."""

    def __init__(self, channels: int = 8, head_dim: int = 4) -> None:
        super().__init__()
        self.head_dim, self.eps = head_dim, 1e-15
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels, bias=False) for _ in range(3))
        self.to_qkv_multiscale = nn.ModuleList([aggregation(channels, channels // head_dim, 5)])
        self.nonlinearity = nn.ReLU()
        self.to_out, self.norm_out = nn.Linear(2 * channels, channels, bias=False), nn.RMSNorm(channels)
        self.processor = Processor()

    def forward(self, x: Tensor) -> Tensor:
        return self.processor(self, x)


class TokenProcessor:
    """What SANA's transformer leaves its linear attention to in diffusers: ReLU features, a one beside each value."""

    def __call__(
        self, attn: TokenAttention, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        others = x if context is None else context
        query, key, value = attn.to_q(x), attn.to_k(others), attn.to_v(others)
        if attn.norm_q is not None and attn.norm_k is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (t.transpose(1, 2).unflatten(1, (attn.heads, -1)) for t in (query, key, value))
        query, key, value = self.features(query).float(), self.features(key).float(), value.float()
        found = F.pad(value, (0, 0, 0, 1), value=1.0) @ key.transpose(2, 3) @ query
        found = (found[:, :, :-1] / (found[:, :, -1:] + 1e-15)).flatten(1, 2).transpose(1, 2).to(x.dtype)
        for layer in attn.to_out:
            found = layer(found)
        return found.clip(-65504, 65504) if x.dtype == torch.float16 else found

    def features(self, x: Tensor) -> Tensor:
        return F.relu(x)


class SoftmaxProcessor:
    """Ordinary attention with the same layers."""

    def __call__(
        self, attn: TokenAttention, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        heads = (layer(x).unflatten(2, (attn.heads, -1)).transpose(1, 2) for layer in (attn.to_q, attn.to_k, attn.to_v))
        query, key, value = heads
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        found = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        for layer in attn.to_out:
            found = layer(found)
        return found


class TokenAttention(nn.Module):
    """Of SANA's transformer: what it computes is up to its processor."""

    def __init__(self, processor: object = None, norm: bool = False, channels: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.dropout, self.residual_connection, self.inner_dim = heads, 0.0, False, channels
        self.norm_q, self.norm_k = (nn.RMSNorm(channels) if norm else None for _ in range(2))
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels), nn.Dropout(0.0)])
        self.processor: Any = TokenProcessor() if processor is None else processor

    def set_processor(self, processor: object) -> None:
        self.processor = processor

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, **kwargs: object) -> Tensor:
        return self.processor(self, x, context=context, mask=mask, **kwargs)
