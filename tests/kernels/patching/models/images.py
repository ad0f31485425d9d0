"""Tokens and images, as the modules here take them."""

from __future__ import annotations

from torch import Tensor


def tokens_to_image(x: Tensor, height: int, width: int) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], -1, height, width)


def image_to_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)
