"""Small modules with the structure of MixFFN in libraries of others, and some that only look like it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.kernels.patching.models.images import image_to_tokens, tokens_to_image


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
