"""Images in: reading files, finding them in folders, bringing any image to one form, resizing.

That form is a float32 tensor ``[3, H, W]`` with values in [0, 1]. 8-bit values are divided by 255. 16-bit and
floating-point values have no agreed white point (12-bit cameras, Hounsfield units), so they are stretched from the
image's own minimum and maximum to 0 and 1; a constant image becomes zeros. (Files of Hounsfield units are shown in
the window of CT, see `read_image`.) Grey images become three equal channels.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError
from torch import Tensor

from msformer.medical import AIR, CT_WINDOW, ImageError, apply_window, is_dicom, is_medical, read_slice, show
from msformer.output import printable

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".dcm", ".dicom", ".nii", ".nii.gz")
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # either byte order, ordinary and BigTIFF


def find_images(paths: Iterable[str | PathLike[str]], *, exclude: Iterable[Path] = ()) -> list[Path]:
    """The image files among the given files and folders (and their subfolders), sorted within each, without repeats.

    Args:
        exclude: folders to leave out where they lie below a given one, such as that of earlier results.

    Raises:
        FileNotFoundError: a path that does not exist.
        PermissionError: a folder that cannot be read.
        ValueError: no image at all, or a given folder is to be left out.
    """
    found: dict[Path, Path] = {}
    given = [Path(path) for path in paths]
    excluded = {folder.resolve() for folder in exclude}
    for path in given:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        if path.is_dir() and path.resolve() in excluded:
            raise ValueError(f"{path}: results cannot go into the folder that the images are in; expected another")
        left_out = {folder for folder in excluded if path.resolve() in folder.parents}
        for file in _images_below(path) if path.is_dir() else [path]:
            if left_out.isdisjoint(file.resolve().parents):
                found.setdefault(file.parent.resolve() / file.name, file)  # links to one image are several
    if not found:
        listed = ", ".join(map(str, given))
        raise ValueError(f"no images ({', '.join(SUFFIXES)}) in: {listed}")
    return list(found.values())


def _images_below(folder: Path) -> Iterator[Path]:
    try:
        entries = sorted(folder.iterdir())
    except PermissionError as error:
        raise PermissionError(f"{folder}: the folder cannot be read: {error.strerror}") from error
    for entry in entries:
        if entry.name.startswith(".") or entry.name.upper() == "DICOMDIR":
            continue
        if entry.is_dir():
            yield from _images_below(entry)
        elif entry.name.lower().endswith(SUFFIXES) or is_dicom(entry):
            yield entry


def plain_name(path: Path) -> str:
    """The name of an image file without its suffix, of which ``.nii.gz`` is one, and the end of a DICOM UID is none."""
    if path.suffix[1:].isdigit():
        return printable(path.name)
    stem = path.name[: -len(".nii.gz")] if path.name.lower().endswith(".nii.gz") else path.stem
    return printable(stem or path.name)


@dataclass(frozen=True)
class Reading:
    """How files without a white point are read.

    Raises:
        ValueError: a window whose ends are not finite or not in order.
    """

    window: tuple[float, float] | None = None
    """The values that become black and white; None: what the file says, else the usual for its kind."""
    slice_index: int | None = None
    """The slice of a NIfTI volume, counted from the feet; None: the middle one."""

    def __post_init__(self) -> None:
        if self.window is not None and not -math.inf < self.window[0] < self.window[1] < math.inf:
            raise ValueError(f"window: expected two numbers, the lower first, got {self.window}")


def read_image(path: str | PathLike[str], reading: Reading = Reading()) -> NDArray[np.generic]:
    """The pixels of a PNG, JPEG, BMP or TIFF file as stored: ``[H, W]``, or ``[H, W, 3]``; 8 or 16 bits, or floating
    point. Of a DICOM or NIfTI file (`msformer.medical`), the slice as it is shown, 8 bits.

    EXIF orientation is applied, palettes are resolved, alpha is dropped. Of a TIFF with several pages the first is
    read, with a warning. A window is applied to any grey image; without one, an image of signed integers as low as
    only CT has, such as a TIFF of Hounsfield units, is shown from -512 to 512.

    Raises:
        FileNotFoundError, PermissionError: as the system says, naming the file.
        ImageError: not an image, damaged, truncated, or of a kind that is not supported.
    """
    path = Path(path)
    if is_medical(path):
        return show(read_slice(path, reading.slice_index), reading.window)
    pixels = _read_ordinary(path)
    window = CT_WINDOW if reading.window is None and _has_air(pixels) else reading.window
    return pixels if window is None or pixels.ndim == 3 else apply_window(pixels, *window)


def is_ct(path: Path, slice_index: int | None = None) -> bool:
    """Whether a file is of computed tomography: as DICOM says, else by values as low as only CT has."""
    if is_medical(path):
        return read_slice(path, slice_index).modality == "CT"
    return _has_air(_read_ordinary(path))


def _has_air(pixels: NDArray[Any]) -> bool:
    """Of signed integers; floating-point values as low may be anything."""
    return pixels.dtype.kind == "i" and bool(pixels.min(initial=0) <= AIR)


def is_colour(image: Tensor) -> bool:
    """Whether the channels of an image ``[3, H, W]`` differ."""
    return not bool((image[0] == image[1]).all() and (image[0] == image[2]).all())


def read_alpha(path: Path) -> NDArray[np.uint8] | None:
    """The alpha channel ``[H, W]`` of an image that Pillow can read; None if it has none, or is of another kind."""
    try:
        with PILImage.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            return np.asarray(image.convert("RGBA"))[..., 3] if image.has_transparency_data else None
    except (OSError, ValueError):
        return None


def _read_ordinary(path: Path) -> NDArray[np.generic]:
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
    return _drop_extra_channels(pixels, str(path))


def _decode_with_pillow(path: Path) -> NDArray[np.generic]:
    with PILImage.open(path) as opened:
        opened.load()
        return _from_pillow(opened)


def _from_pillow(image: PILImage.Image) -> NDArray[np.generic]:
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


def _drop_extra_channels(pixels: NDArray[np.generic], name: str) -> NDArray[np.generic]:
    """``[H, W, 1..4]`` -> ``[H, W]`` or ``[H, W, 3]``."""
    if pixels.ndim == 3 and pixels.shape[2] in (1, 2):
        return pixels[..., 0]
    if pixels.ndim == 3 and pixels.shape[2] in (3, 4):
        return pixels[..., :3]
    if pixels.ndim != 2:
        raise ImageError(f"{name}: expected a grey or colour image, got shape {pixels.shape}")
    return pixels


def prepare_image(image: Any) -> Tensor:
    """Any kind of image that `msformer.segment` takes -> float32 ``[3, H, W]`` in [0, 1].

    Raises:
        ValueError: not an image, an unsupported shape or type, NaN or infinite values, no pixels.
        OSError: a path that cannot be read.
    """
    name = "image"
    if isinstance(image, str | PathLike):
        name = str(image)
        pixels = read_image(image)
    elif isinstance(image, PILImage.Image):
        pixels = _from_pillow(image)
    elif isinstance(image, Tensor):
        if image.dim() != 3 or image.shape[0] not in (1, 3):
            raise ValueError(f"image: expected a tensor [1 or 3, H, W], got shape {tuple(image.shape)}")
        pixels = (
            image.detach().cpu().permute(1, 2, 0).float().numpy()
            if image.is_floating_point()
            else (image.detach().cpu().permute(1, 2, 0).numpy())
        )
        pixels = _drop_extra_channels(pixels, name)
    elif isinstance(image, np.ndarray):
        pixels = _drop_extra_channels(image, name)
    else:
        raise ValueError(f"image: expected a path, array, tensor or PIL image, got {type(image).__name__}")
    if pixels.size == 0:
        raise ValueError(f"{name}: has no pixels, shape {pixels.shape}")
    values = torch.from_numpy(np.ascontiguousarray(_to_unit_range(pixels, name)))
    return values.expand(3, *values.shape) if values.dim() == 2 else values.permute(2, 0, 1)


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


def resize_labels(labels: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """``[h, w]`` -> ``[*size]`` by nearest neighbour, pixel centres on pixel centres."""
    return labels[np.ix_(*(nearest(new, old) for new, old in zip(size, labels.shape, strict=True)))]


def nearest(new: int, old: int) -> NDArray[np.int64]:
    """For each of `new` pixels of a line, which of the `old` ones is nearest."""
    return np.minimum(((np.arange(new) + 0.5) * old / new).astype(np.int64), old - 1)
