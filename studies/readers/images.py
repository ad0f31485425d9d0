"""PNG, JPEG, TIFF and others: pixels beside SimpleITK's decoders. tifffile ships no files; scikit-image does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msformer.io.read import read_image
from studies.readers.compare import Source, optional, shipped

_IMAGES = r"\.(png|jpe?g|bmp|tiff?|gif|webp)$"


def files() -> Iterator[Path]:
    """What tifffile, scikit-image and matplotlib ship."""
    for package in ("tifffile", "skimage", "matplotlib"):
        yield from shipped(package, "", _IMAGES)


def pictures(path: Path) -> int:
    read_image(path)
    return 1


def ours(path: Path, index: int) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    return read_image(path), None


def simpleitk_pixels(path: Path, index: int) -> NDArray[Any]:
    sitk = optional("SimpleITK")
    if sitk is None:
        raise NotImplementedError("SimpleITK is not installed")
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    image = sitk.ReadImage(str(path))
    pixels = np.asarray(sitk.GetArrayFromImage(image))
    if image.GetDimension() == 3:
        pixels = pixels[0]
    if image.GetNumberOfComponentsPerPixel() == 2:
        return pixels[..., 0]
    return pixels[..., :3] if image.GetNumberOfComponentsPerPixel() == 4 else pixels


SOURCE = Source(
    "images of tifffile, scikit-image and matplotlib",
    files,
    pictures,
    {"values": ours},
    {"SimpleITK": ("values", simpleitk_pixels)},
    known={("SimpleITK", r"\.jpe?g$"): "lossy JPEG: decoders may round, and spread halved colours, differently"},
)
