"""Small modules with the published structures of others, written after the papers and the public code.

Each is what `patch` finds in the wild: other names of layers, other calling conventions, other places of dropout.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def tokens_to_image(x: Tensor, height: int, width: int) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], -1, height, width)


def image_to_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


class DepthwiseConv(nn.Module):
    """SegFormer's, with its own reshaping."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return image_to_tokens(self.dwconv(tokens_to_image(x, height, width)))


class DenseMixFFN(nn.Module):
    """Names and dropout of transformers 4, SegFormer and GLPN."""

    def __init__(self, channels: int = 8, hidden: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.dense1 = nn.Linear(channels, hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.intermediate_act_fn = nn.GELU()
        self.dense2 = nn.Linear(hidden, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: Tensor, height: int, width: int) -> Tensor:
        x = self.intermediate_act_fn(self.dwconv(self.dense1(hidden_states), height, width))
        return self.dropout(self.dense2(self.dropout(x)))


class FlatMixFFN(nn.Module):
    """timm's PVTv2: the size is a tuple, the convolution is not wrapped; with `extra_relu` it is PVTv2-Li's."""

    def __init__(self, channels: int = 8, hidden: int = 16, extra_relu: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.relu = nn.ReLU() if extra_relu else nn.Identity()
        self.dwconv = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, channels)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        x = self.relu(tokens_to_image(self.fc1(x), *feat_size))
        return self.drop(self.fc2(self.drop(self.act(image_to_tokens(self.dwconv(x))))))


class InlineMixFFN(nn.Module):
    """An activation that is no module, fc2 defined before the convolution, as many hidden channels as channels."""

    def __init__(self, channels: int = 8, hidden: int = 8) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding="same", groups=hidden)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        return self.fc2(F.relu(image_to_tokens(self.conv(tokens_to_image(self.fc1(x), h, w)))))


class DropPath(nn.Module):
    """Drops the whole path of some images."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * torch.rand(x.shape[0], *[1] * (x.dim() - 1), dtype=x.dtype).add(keep).floor() / keep


class ConvMixFFN(nn.Module):
    """OpenMMLab's: 1x1 convolutions in a row, an `identity` that is added, DropPath inside."""

    def __init__(self, channels: int = 8, hidden: int = 16, drop_path: float = 0.0) -> None:
        super().__init__()
        drop = nn.Dropout(0.0)
        convolution = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        first, last = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        self.layers = nn.Sequential(first, convolution, nn.GELU(), drop, last, drop)
        self.dropout_layer = DropPath(drop_path)

    def forward(self, x: Tensor, hw_shape: tuple[int, int], identity: Tensor | None = None) -> Tensor:
        out = image_to_tokens(self.layers(tokens_to_image(x, *hw_shape)))
        return (x if identity is None else identity) + self.dropout_layer(out)


class ImageMixFFN(nn.Module):
    """Of an image, with tanh-GELU."""

    def __init__(self, channels: int = 8, hidden: int = 16) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden, bias=False)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.dwconv(self.fc1(x))))


class MixFFNSkip(nn.Module):
    """MISSFormer's and DAE-Former's: one norm is used, two are not."""

    def __init__(self, channels: int = 8, hidden: int = 16) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, channels)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(hidden), nn.LayerNorm(hidden), nn.LayerNorm(hidden)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        return self.fc2(self.act(self.norm1(self.dwconv(self.fc1(x), H, W) + self.fc1(x))))


class PreNormMixFFN(FlatMixFFN):
    """With its own norm and residual."""

    def __init__(self, channels: int = 8, hidden: int = 16) -> None:
        super().__init__(channels, hidden)
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        return x + super().forward(self.norm(x), feat_size)


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


class TupleBlock(nn.Module):
    """SegFormer's of transformers 4: returns a tuple."""

    def __init__(self, channels: int = 8, drop_path: float = 0.0) -> None:
        super().__init__()
        self.layer_norm_1 = nn.LayerNorm(channels)
        self.attention = TupleAttention(channels)
        self.drop_path = DropPath(drop_path)
        self.layer_norm_2 = nn.LayerNorm(channels)
        self.mlp = DenseMixFFN(channels)

    def forward(self, x: Tensor, height: int, width: int, output_attentions: bool = False) -> tuple[Tensor, ...]:
        attended, *rest = self.attention(self.layer_norm_1(x), height, width, output_attentions)
        x = self.drop_path(attended) + x
        return (self.drop_path(self.mlp(self.layer_norm_2(x), height, width)) + x, *rest)


class KeywordAttention(TupleAttention):
    """Twice as much where attentions are to be returned, so that it shows what it was told."""

    def forward(self, x: Tensor, height: int, width: int, **kwargs: bool) -> tuple[Tensor, ...]:  # type: ignore[override]
        (found,) = super().forward(x, height, width)
        return found * (2 if kwargs.get("output_attentions") else 1), found


class KeywordBlock(TupleBlock):
    """SegFormer's of transformers 5: returns a tensor, hands any keyword on to the attention."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__(channels)
        self.attention = KeywordAttention(channels)

    def forward(self, x: Tensor, height: int, width: int, **kwargs: bool) -> Tensor:  # type: ignore[override]
        attended, _ = self.attention(self.layer_norm_1(x), height, width, **kwargs)
        x = attended + x
        return self.mlp(self.layer_norm_2(x), height, width) + x


class DeafBlock(KeywordBlock):
    """Keeps the keywords for itself."""

    def forward(self, x: Tensor, height: int, width: int, **kwargs: bool) -> Tensor:  # type: ignore[override]
        return super().forward(x, height, width)


class ImageBlock(nn.Module):
    """segmentation_models_pytorch's: of an image."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(channels), PooledAttention(channels)
        self.norm2, self.mlp = nn.LayerNorm(channels), DenseMixFFN(channels)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        x = image_to_tokens(x)
        x = x + self.attn(self.norm1(x), height, width)
        x = x + self.mlp(self.norm2(x), height, width)
        return tokens_to_image(x, height, width)


class EfficientBlock(nn.Module):
    """DAE-Former's: efficient attention of an image inside a block of tokens, MixFFN-skip."""

    def __init__(self, channels: int = 8, hidden: int = 16) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(channels), EfficientAttention(channels, channels, channels)
        self.norm2, self.mlp = nn.LayerNorm(channels), MixFFNSkip(channels, hidden)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        x = x + image_to_tokens(self.attn(tokens_to_image(self.norm1(x), H, W)))
        return x + self.mlp(self.norm2(x), H, W)


class MissFormerBlock(nn.Module):
    """MISSFormer's: attention with fewer keys, MixFFN-skip."""

    def __init__(self, channels: int = 8, hidden: int = 16) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(channels), PooledAttention(channels)
        self.norm2, self.mlp = nn.LayerNorm(channels), MixFFNSkip(channels, hidden)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        x = x + self.attn(self.norm1(x), H, W)
        return x + self.mlp(self.norm2(x), H, W)


class IdentityAttention(PooledAttention):
    def forward(self, x: Tensor, hw_shape: tuple[int, int], identity: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return (x if identity is None else identity) + super().forward(x, *hw_shape)


class IdentityBlock(nn.Module):
    """OpenMMLab's: what is added is an argument of attention and feed-forward layer."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(channels), IdentityAttention(channels)
        self.norm2, self.ffn = nn.LayerNorm(channels), ConvMixFFN(channels)

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        x = self.attn(self.norm1(x), hw_shape, identity=x)
        return self.ffn(self.norm2(x), hw_shape, identity=x)


class GatedFFN(nn.Module):
    """GLUMBConv of SANA: SiLU before, a gate after the convolution."""

    def __init__(self, channels: int = 8, hidden: int = 16) -> None:
        super().__init__()
        self.conv_inverted = nn.Conv2d(channels, 2 * hidden, 1)
        self.conv_depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, 1, 1, groups=2 * hidden)
        self.conv_point = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.conv_depth(F.silu(self.conv_inverted(x))).chunk(2, 1)
        return self.conv_point(x * F.silu(gate))


class NormedGateFFN(GatedFFN):
    """The gate alone has a norm, without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.conv_depth(F.silu(self.conv_inverted(x))).chunk(2, 1)
        return self.conv_point(x * F.silu(F.normalize(gate, dim=1)))


class PartlyMixedFFN(nn.Module):
    """MambaOut's: some channels go through the convolution, and others are gates."""

    def __init__(self, channels: int = 8, hidden: int = 16, mixed: int = 6) -> None:
        super().__init__()
        self.sizes = (hidden, hidden - mixed, mixed)
        self.norm = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, 2 * hidden)
        self.conv = nn.Conv2d(mixed, mixed, 7, padding=3, groups=mixed)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, C]``."""
        gate, kept, mixed = self.fc1(self.norm(x)).split(self.sizes, -1)
        mixed = self.conv(mixed.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.fc2(F.gelu(gate) * torch.cat((kept, mixed), -1))


class LongerMixFFN(nn.Module):
    """segformer-pytorch: a further 1x1 convolution of the hidden channels."""

    def __init__(self, channels: int = 8, hidden: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden),
            nn.Conv2d(hidden, hidden, 1),
            nn.GELU(),
            nn.Conv2d(hidden, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class WideMixFFN(FlatMixFFN):
    """A larger convolution."""

    def __init__(self, kernel_size: int = 7, channels: int = 8, hidden: int = 16) -> None:
        super().__init__(channels, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, kernel_size, 1, kernel_size // 2, groups=hidden)


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


class Projection(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return tokens_to_image(self.proj(image_to_tokens(x)), *x.shape[2:])


class AllMLPDecoder(nn.Module):
    """transformers' SegFormer."""

    ALIGN = False

    def __init__(self, channels: tuple[int, ...] = (4, 6, 8), hidden: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        self.linear_c = nn.ModuleList(Projection(each, hidden) for each in channels)
        self.linear_fuse = nn.Conv2d(hidden * len(channels), hidden, 1, bias=False)
        self.batch_norm = nn.BatchNorm2d(hidden)
        self.activation = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Conv2d(hidden, 3, 1)

    def projected(self, projection: nn.Module, x: Tensor) -> Tensor:
        found: Tensor = projection(x)
        return found

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        maps = []
        for x, projection in zip(features, self.linear_c, strict=False):
            projected = self.projected(projection, x)
            maps.append(F.interpolate(projected, features[0].shape[2:], mode="bilinear", align_corners=self.ALIGN))
        fused = self.linear_fuse(torch.cat(maps[::-1], 1))
        found: Tensor = self.classifier(self.dropout(self.activation(self.batch_norm(fused))))
        return found


class ImageFirstDecoder(nn.Module):
    """segmentation_models_pytorch's SegFormer: the image comes first, the smallest features have the first layer."""

    def __init__(self, channels: tuple[int, ...] = (4, 6, 8), hidden: int = 8) -> None:
        super().__init__()
        self.mlp_stage = nn.ModuleList(Projection(each, hidden) for each in channels[::-1])
        fuse = nn.Conv2d(hidden * len(channels), hidden, 1)
        self.fuse_stage = nn.Sequential(fuse, nn.BatchNorm2d(hidden), nn.ReLU())

    def forward(self, features: list[Tensor]) -> Tensor:
        size = [side // 4 for side in features[0].shape[2:]]
        used = (features[2:] if features[1].shape[1] == 0 else features[1:])[::-1]
        maps = [
            F.interpolate(projection(x), size, mode="bilinear", align_corners=False)
            for x, projection in zip(used, self.mlp_stage, strict=False)
        ]
        found: Tensor = self.fuse_stage(torch.cat(maps, 1))
        return found
