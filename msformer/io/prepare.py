"""Bringing any image to one form, and resizing.

That form is a float32 tensor ``[3, H, W]`` with values in [0, 1]. 8-bit values are divided by 255. 16-bit and
floating-point values have no agreed white point (12-bit cameras, Hounsfield units), so they are stretched from the
image's own minimum and maximum to 0 and 1; a constant image becomes zeros. (Files of Hounsfield units are shown in
the window of CT, see `read_image`.) Grey images become three equal channels.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image as PILImage
from torch import Tensor

from msformer.io.base import apply_window
from msformer.io.ordinary import drop_extra_channels, from_pillow
from msformer.io.read import AS_IT_IS, Reading, read_image


def prepare_image(image: Any, reading: Reading = AS_IT_IS) -> Tensor:
    """Any kind of image that `msformer.segment` takes -> float32 ``[3, H, W]`` in [0, 1].

    Args:
        reading: of a file. Its window is for grey arrays and tensors, too.

    Raises:
        ValueError: not an image, an unsupported shape or type, NaN or infinite values, no pixels; a slice or modality
            of what is no file.
        OSError: a path that cannot be read.
    """
    name = "image"
    if isinstance(image, str | PathLike):
        name = str(image)
        pixels = read_image(image, reading)
    elif isinstance(image, PILImage.Image):
        pixels = from_pillow(image)
    elif isinstance(image, Tensor):
        if image.dim() != 3 or image.shape[0] not in (1, 3):
            raise ValueError(f"image: expected a tensor [1 or 3, H, W], got shape {tuple(image.shape)}")
        pixels = (
            image.detach().cpu().permute(1, 2, 0).float().numpy()
            if image.is_floating_point()
            else (image.detach().cpu().permute(1, 2, 0).numpy())
        )
        pixels = drop_extra_channels(pixels, name)
    elif isinstance(image, np.ndarray):
        pixels = drop_extra_channels(image, name)
    else:
        raise ValueError(f"image: expected a path, array, tensor or PIL image, got {type(image).__name__}")
    if pixels.size == 0:
        raise ValueError(f"{name}: has no pixels, shape {pixels.shape}")
    if not isinstance(image, str | PathLike):
        pixels = _windowed(pixels, reading)
    values = torch.from_numpy(np.ascontiguousarray(_to_unit_range(pixels, name)))
    return values.expand(3, *values.shape) if values.dim() == 2 else values.permute(2, 0, 1)


def _windowed(pixels: NDArray[Any], reading: Reading) -> NDArray[Any]:
    """Grey values that are from no file, as the reading says."""
    for argument in ("slice_index", "modality"):
        if getattr(reading, argument) is not None:
            raise ValueError(f"{argument}: expected the path of a file with it, got an image in memory")
    return pixels if reading.window is None or pixels.ndim == 3 else apply_window(pixels, *reading.window)


def _to_unit_range(pixels: NDArray[Any], name: str) -> NDArray[np.float32]:
    if pixels.dtype == np.bool_:
        return pixels.astype(np.float32)
    if pixels.dtype == np.uint8:
        return (pixels / 255).astype(np.float32)
    if pixels.dtype.kind not in "iuf":
        raise ValueError(f"{name}: expected integer or floating-point pixels, got {pixels.dtype}")
    values = pixels.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: holds NaN or infinite values")
    low, high = values.min(), values.max()
    return ((values - low) / (high - low if high > low else 1)).astype(np.float32)


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """``[3, H, W]`` -> ``[3, *size]``: bilinear, averaging over the area that falls on a pixel when shrinking."""
    if tuple(image.shape[1:]) == size:
        return image.contiguous()
    return F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0].clamp(0, 1)


def standardise_channels(image: Tensor) -> Tensor:
    """``[..., H, W]`` -> the same shape, each channel of each image with mean 0 and variance 1; zeros if constant."""
    spread, mean = torch.std_mean(image, dim=(-2, -1), correction=0, keepdim=True)
    return (image - mean) / torch.where(spread > 1e-6, spread, 1)


def resize_labels(labels: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """``[h, w]`` -> ``[*size]`` by nearest neighbour, pixel centres on pixel centres."""
    return labels[np.ix_(*(nearest(new, old) for new, old in zip(size, labels.shape, strict=True)))]


def nearest(new: int, old: int) -> NDArray[np.int64]:
    """For each of `new` pixels of a line, which of the `old` ones is nearest."""
    return np.minimum(((np.arange(new) + 0.5) * old / new).astype(np.int64), old - 1)
