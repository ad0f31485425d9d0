"""Small transformer blocks with the structures of others: SegFormer, MISSFormer, DAE-Former, OpenMMLab."""

from __future__ import annotations

from torch import Tensor, nn

from tests.kernels.patching.models.attentions import (
    EfficientAttention,
    IdentityAttention,
    KeywordAttention,
    PooledAttention,
    TupleAttention,
)
from tests.kernels.patching.models.images import image_to_tokens, tokens_to_image
from tests.kernels.patching.models.mix_ffns import ConvMixFFN, DenseMixFFN, DropPath, MixFFNSkip


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


class IdentityBlock(nn.Module):
    """OpenMMLab's: what is added is an argument of attention and feed-forward layer."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(channels), IdentityAttention(channels)
        self.norm2, self.ffn = nn.LayerNorm(channels), ConvMixFFN(channels)

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        x = self.attn(self.norm1(x), hw_shape, identity=x)
        return self.ffn(self.norm2(x), hw_shape, identity=x)
