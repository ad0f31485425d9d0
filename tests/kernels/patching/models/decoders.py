"""Small all-MLP decoders, as SegFormer's of transformers and of segmentation_models_pytorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.kernels.patching.models.images import image_to_tokens, tokens_to_image


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
