"""PNG, JPEG, BMP and TIFF, through Pillow, imagecodecs and tifffile."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError

from msformer.io.base import ImageError

TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # either byte order, ordinary and BigTIFF


def read_alpha(path: Path) -> NDArray[np.uint8] | None:
    """The alpha channel ``[H, W]`` of an image that Pillow can read; None if it has none, or is of another kind."""
    try:
        with PILImage.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            return np.asarray(image.convert("RGBA"))[..., 3] if image.has_transparency_data else None
    except (OSError, ValueError):
        return None


def read_ordinary(path: Path) -> NDArray[np.generic]:
    data = path.read_bytes()
    try:
        if data[:4] in TIFF_SIGNATURES:
            pixels = _decode_tiff(path)
        elif data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:25] == b"\x10":
            pixels = _decode_png16(data)
        else:
            pixels = _decode_with_pillow(path)
    except UnidentifiedImageError as error:
        raise ImageError(f"{path}: not an image that can be read") from error
    except (PermissionError, FileNotFoundError):
        raise
    except Exception as error:  # decoders raise whatever they like on damaged files
        raise ImageError(f"{path}: damaged or unsupported image: {error}") from error
    return drop_extra_channels(pixels, str(path))


def _decode_with_pillow(path: Path) -> NDArray[np.generic]:
    with PILImage.open(path) as opened:
        opened.load()
        return from_pillow(opened)


def from_pillow(image: PILImage.Image) -> NDArray[np.generic]:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        return np.asarray(image)
    return np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))


def _decode_png16(data: bytes) -> NDArray[np.generic]:
    # pillow keeps only the upper 8 bits of 16-bit colour
    import imagecodecs

    return np.asarray(imagecodecs.png_decode(data))


def _decode_tiff(path: Path) -> NDArray[np.generic]:
    import tifffile

    kinds = tifffile.PHOTOMETRIC
    with tifffile.TiffFile(path) as tiff:
        pages = [page for page in tiff.pages if not page.is_reduced]
        if len(pages) > 1:
            warnings.warn(f"{path}: the first of {len(pages)} pages is read", stacklevel=4)
        page = tiff.pages[0]
        # pillow turns inverted grey back itself, but only that of 8 bits
        inverted = page.photometric == kinds.MINISWHITE and page.dtype.kind in "iu"
        if page.photometric in (kinds.MINISBLACK, kinds.RGB) or inverted:
            pixels: NDArray[Any] = np.asarray(page.asarray())
            if page.axes == "SYX":  # channels stored one after the other
                pixels = np.moveaxis(pixels, 0, -1)
            if inverted:
                pixels = ~pixels
            if 1 < page.bitspersample < 8:  # stored in bytes, the upper bits of which mean nothing
                white = 2**page.bitspersample - 1
                pixels = (pixels & white) * (255 // white)
            orientation = page.tags.get("Orientation")
            return _turn_upright(pixels, 1 if orientation is None else int(orientation.value))
    # palettes, CMYK, JPEG's YCbCr: pillow knows how to show them
    return _decode_with_pillow(path)


def _turn_upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Undoes an orientation as TIFF and EXIF number them, 1 to 8 (TIFF 6.0, page 36)."""
    if orientation in (5, 6, 7, 8):
        pixels = np.swapaxes(pixels, 0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels


def drop_extra_channels(pixels: NDArray[np.generic], name: str) -> NDArray[np.generic]:
    """``[H, W, 1..4]`` -> ``[H, W]`` or ``[H, W, 3]``."""
    if pixels.ndim == 3 and pixels.shape[2] in (1, 2):
        return pixels[..., 0]
    if pixels.ndim == 3 and pixels.shape[2] in (3, 4):
        return pixels[..., :3]
    if pixels.ndim != 2:
        raise ImageError(f"{name}: expected a grey or colour image, got shape {pixels.shape}")
    return pixels
