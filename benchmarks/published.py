"""The published structures in eager PyTorch, with the parameter names of `msformer_kernels` and `msformer`.

They are what the operators are compared with, so they do what the published code does, step by step: 1x1 convolutions
on channels-first images, a loop over heads, the first product of MixFFN-skip made twice, tokens and images rearranged
into each other around every layer, upsampled and concatenated features written out.

Sources: Shen et al., "Efficient Attention", WACV 2021; Xie et al., "SegFormer", NeurIPS 2021; Huang et al.,
"MISSFormer", 2021; Karimijafarbigloo et al., "MS-Former", MIDL 2023, and the code published with it. Two things differ,
so that results can be compared at any size: the upsampled branch is cropped to the image, and patches are cut from the
largest grid that fits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from msformer.model import ATTENTION_SCALE, PATCH_SIZE, MSFormerOutput

from .cases import Shape


class PublishedAttention(nn.Module):
    """``[B, C, H, W]`` -> the same shape, and the context of the last head ``[B, C / heads, C / heads]``."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.keys = nn.Conv2d(dim, dim, 1)
        self.queries = nn.Conv2d(dim, dim, 1)
        self.values = nn.Conv2d(dim, dim, 1)
        self.reprojection = nn.Conv2d(dim, dim, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        height, width = image.shape[2:]
        keys, queries, values = (
            projection(image).flatten(2).chunk(self.num_heads, dim=1)
            for projection in (self.keys, self.queries, self.values)
        )
        attended = []
        for key, query, value in zip(keys, queries, values, strict=True):
            context = F.softmax(key, dim=2) @ value.transpose(1, 2)
            attended.append((context.transpose(1, 2) @ F.softmax(query, dim=1)).unflatten(2, (height, width)))
        return self.reprojection(torch.cat(attended, dim=1)), context


class PublishedDepthwiseConv(nn.Module):
    """Tokens are viewed as an image for the 3x3 depthwise convolution, and its output as tokens."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        batch, _, channels = tokens.shape
        image = tokens.transpose(1, 2).view(batch, channels, height, width)
        return self.dwconv(image).flatten(2).transpose(1, 2)


class PublishedMixFFN(nn.Module):
    """MixFFN on tokens."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = PublishedDepthwiseConv(hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return self.fc2(F.gelu(self.dwconv(self.fc1(x), height, width)))


class PublishedMixFFNSkip(PublishedMixFFN):
    """MixFFN-skip on tokens; the first product is made for the convolution, and once more for the skip connection."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(dim, hidden)
        self.norm1 = nn.LayerNorm(hidden)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return self.fc2(F.gelu(self.norm1(self.dwconv(self.fc1(x), height, width) + self.fc1(x))))


class PublishedAttentionLayer(nn.Module):
    """LayerNorm, attention and residual, of an image ``[B, C, H, W]``."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.dim)
        self.attn = PublishedAttention(shape.dim, shape.heads)

    def forward(self, image: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        tokens, context = self.on_tokens(rearrange(image, "b d h w -> b (h w) d"), height, width)
        return rearrange(tokens, "b (h w) d -> b d h w", h=height), context

    def on_tokens(self, tokens: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        attended, context = self.attn(rearrange(self.norm1(tokens), "b (h w) d -> b d h w", h=height, w=width))
        return tokens + rearrange(attended, "b d h w -> b (h w) d"), context


class PublishedFeedForwardLayer(nn.Module):
    """LayerNorm, MixFFN or MixFFN-skip, and residual, of tokens."""

    def __init__(self, shape: Shape, skip: bool) -> None:
        super().__init__()
        self.norm2 = nn.LayerNorm(shape.dim)
        self.mlp = (PublishedMixFFNSkip if skip else PublishedMixFFN)(shape.dim, shape.hidden)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return x + self.mlp(self.norm2(x), height, width)


class PublishedBlock(PublishedAttentionLayer):
    """The transformer block with MixFFN-skip, of an image ``[B, C, H, W]``."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.norm2 = nn.LayerNorm(shape.dim)
        self.mlp = PublishedMixFFNSkip(shape.dim, shape.hidden)

    def on_tokens(self, tokens: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        tokens, context = super().on_tokens(tokens, height, width)
        return tokens + self.mlp(self.norm2(tokens), height, width), context


class PublishedPatchEmbedding(nn.Module):
    """3x3 convolution and BatchNorm, channels first."""

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, 3, stride=stride, padding=1)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.proj(image))


class PublishedMSFormer(nn.Module):
    """The whole network; `shape` gives its width, heads and hidden width. `attention` as in `MSFormer.forward`."""

    def __init__(self, shape: Shape, depth: int = 2) -> None:
        super().__init__()
        dim = self.num_clusters = shape.dim
        self.patch_embed_s = PublishedPatchEmbedding(dim, stride=1)
        self.patch_embed_l = PublishedPatchEmbedding(dim, stride=2)
        self.block_s = nn.ModuleList(PublishedBlock(shape) for _ in range(depth))
        self.bn2_s = nn.ModuleList(nn.BatchNorm2d(dim) for _ in range(depth))
        self.block_l = nn.ModuleList(PublishedBlock(shape) for _ in range(depth))
        self.bn2_l = nn.ModuleList(nn.BatchNorm2d(dim) for _ in range(depth))
        self.linear_up = nn.Linear(dim, 4 * dim, bias=False)
        self.linear_down = nn.Linear(2 * dim, dim, bias=False)
        self.bn3 = nn.BatchNorm2d(dim)
        self.to_patch_embedding = nn.Sequential(nn.Identity(), nn.Linear(PATCH_SIZE * PATCH_SIZE * dim, dim))

    def forward(self, image: Tensor, *, attention: bool = True) -> MSFormerOutput:
        small, context_small = _branch(self.patch_embed_s(image), self.block_s, self.bn2_s)
        large, context_large = _branch(self.patch_embed_l(image), self.block_l, self.bn2_l)
        height, width = image.shape[2:]
        upsampled = rearrange(
            self.linear_up(rearrange(large, "b d h w -> b h w d")),
            "b h w (row column d) -> b (h row) (w column) d",
            row=2,
            column=2,
        )
        features = torch.cat([upsampled[:, :height, :width], small.permute(0, 2, 3, 1)], dim=-1)
        logits = self.linear_down(features).permute(0, 3, 1, 2)
        attention_map = self._attention_map(logits) if attention else logits.new_empty(image.shape[0], 0, 0)
        return MSFormerOutput(logits, attention_map, context_small, context_large)

    def _attention_map(self, logits: Tensor) -> Tensor:
        features = self.bn3(logits)
        query, key = self._patches(features[:, :, 1:, 1:]), self._patches(features[:, :, :-1, :-1])
        return torch.softmax(query @ key.transpose(-1, -2) * ATTENTION_SCALE, dim=-1)

    def _patches(self, features: Tensor) -> Tensor:
        height, width = (size // PATCH_SIZE * PATCH_SIZE for size in features.shape[2:])
        grid = features[:, :, :height, :width]
        patches = rearrange(grid, "b d (h row) (w column) -> b (h w) (row column d)", row=PATCH_SIZE, column=PATCH_SIZE)
        return self.to_patch_embedding(patches)


def _branch(image: Tensor, blocks: nn.ModuleList, norms: nn.ModuleList) -> tuple[Tensor, Tensor]:
    for block, norm in zip(blocks, norms, strict=True):
        image, context = block(image, *image.shape[2:])
        image = norm(image)
    return image, context
