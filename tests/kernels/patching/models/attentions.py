"""Small modules with the attention of others: efficient, linear, and ordinary with fewer keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.kernels.patching.models.images import image_to_tokens, tokens_to_image


class EfficientAttention(nn.Module):
    """DAE-Former's: Shen et al., a loop over heads of an image."""

    def __init__(self, in_channels: int = 8, key_channels: int = 8, value_channels: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.key_channels, self.head_count, self.value_channels = key_channels, heads, value_channels
        self.keys = nn.Conv2d(in_channels, key_channels, 1)
        self.queries = nn.Conv2d(in_channels, key_channels, 1)
        self.values = nn.Conv2d(in_channels, value_channels, 1)
        self.reprojection = nn.Conv2d(value_channels, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        keys, queries, values = (
            p(x).flatten(2).chunk(self.head_count, 1) for p in (self.keys, self.queries, self.values)
        )
        attended = []
        for key, query, value in zip(keys, queries, values, strict=True):
            context = F.softmax(key, dim=2) @ value.transpose(1, 2)
            attended.append((context.transpose(1, 2) @ F.softmax(query, dim=1)).unflatten(2, x.shape[2:]))
        return self.reprojection(torch.cat(attended, 1))


class ChannelNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.g * x.shape[1] ** 0.5


class LinearAttention(nn.Module):
    """Of diffusion models: query over features, key over tokens, memory tokens, a scale, a norm on each side."""

    def __init__(self, channels: int = 8, heads: int = 2, dim_head: int = 4, memory: int = 3) -> None:
        super().__init__()
        self.scale, self.heads = dim_head**-0.5, heads
        self.norm = ChannelNorm(channels)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, dim_head, memory)) if memory else None
        self.to_qkv = nn.Conv2d(channels, 3 * heads * dim_head, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(heads * dim_head, channels, 1), ChannelNorm(channels))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.flatten(2).unflatten(1, (self.heads, -1)) for t in self.to_qkv(self.norm(x)).chunk(3, 1))
        if self.mem_kv is not None:
            k, v = (torch.cat((m.expand(len(x), -1, -1, -1), t), -1) for m, t in zip(self.mem_kv, (k, v), strict=True))
        context = k.softmax(-1) @ v.transpose(-1, -2)
        out = context.transpose(-1, -2) @ (q.softmax(-2) * self.scale)
        return self.to_out(out.flatten(1, 2).unflatten(2, x.shape[2:]))


class PooledAttention(nn.Module):
    """Attention with fewer keys, as SegFormer's and PVT's."""

    def __init__(self, channels: int = 8, ratio: int = 2) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(channels, channels), nn.Linear(channels, 2 * channels)
        self.sr = nn.Conv2d(channels, channels, ratio, ratio)
        self.norm, self.proj = nn.LayerNorm(channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        fewer = self.norm(image_to_tokens(self.sr(tokens_to_image(x, height, width))))
        k, v = self.kv(fewer).chunk(2, -1)
        return self.proj(F.scaled_dot_product_attention(self.q(x), k, v))


class TupleAttention(PooledAttention):
    def forward(self, x: Tensor, height: int, width: int, output_attentions: bool = False) -> tuple[Tensor, ...]:  # type: ignore[override]
        found = super().forward(x, height, width)
        return (found, found.square()) if output_attentions else (found,)


class KeywordAttention(TupleAttention):
    """Twice as much where attentions are to be returned, so that it shows what it was told."""

    def forward(self, x: Tensor, height: int, width: int, **kwargs: bool) -> tuple[Tensor, ...]:  # type: ignore[override]
        (found,) = super().forward(x, height, width)
        return found * (2 if kwargs.get("output_attentions") else 1), found


class IdentityAttention(PooledAttention):
    def forward(self, x: Tensor, hw_shape: tuple[int, int], identity: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return (x if identity is None else identity) + super().forward(x, *hw_shape)
