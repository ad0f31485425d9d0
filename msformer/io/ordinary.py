"""Ordinary picture files, by their content: PNG, JPEG, GIF, WebP, BMP, JPEG 2000, AVIF and PNM through Pillow, HEIC
through pillow-heif, TIFF through `msformer.io.tiff`.

Of an animation or a burst the first picture is read, or the one that the file names. Damage to what stands beside the
pixels (EXIF, colour profiles, comments) gives a warning, never an error.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import UnidentifiedImageError

from msformer.io.base import ImageError, Notes, needs_package
from msformer.io.containers import (
    BitFields,
    JpegFrame,
    bit_fields,
    exif_of,
    is_heif,
    is_lossy,
    is_whole_jpeg,
    jpeg_frame,
    only_pixels,
)
from msformer.io.raster import MOST_PIXELS, Raster, check_size, eight_bits, turn_upright
from msformer.io.tiff import SIGNATURES, lab_to_rgb, read_tiff

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "DIB", "JPEG2000", "AVIF", "PPM")
"""What Pillow may read: no format that runs another program, or that anything can be taken for."""

_ORIENTATION = 0x0112


def read_raster(path: Path) -> Raster:
    """An ordinary picture file.

    Raises:
        FileNotFoundError, PermissionError: as the system says, naming the file.
        ImageError: not a picture, damaged, truncated, too large, or of a kind that is not supported.
    """
    notes = Notes(path)
    return replace(_read(notes), notes=tuple(notes.sentences))


def _read(notes: Notes) -> Raster:
    path = notes.path
    with path.open("rb") as file:
        head = file.read(32)
    try:
        if head[:4] in SIGNATURES:
            return read_tiff(notes)
        data = path.read_bytes()
        if is_heif(head):
            return _read_heif(data, path)
        if head[:8] == b"\x89PNG\r\n\x1a\n" and head[24:25] == b"\x10":
            return _read_png16(data, notes)
        if head[:2] == b"\xff\xd8" and (frame := jpeg_frame(data)) and frame.bits != 8:
            return _read_deep_jpeg(data, frame, notes)
        return _read_with_pillow(data, notes)
    except UnidentifiedImageError as error:
        raise ImageError(f"{path}: not an image that can be read") from error
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError(f"{path}: is damaged, or too large for the memory: {error}") from error
    except Exception as error:  # decoders raise whatever they like on damaged files
        raise ImageError(f"{path}: damaged or unsupported image: {error}") from error


def _read_with_pillow(data: bytes, notes: Notes) -> Raster:
    try:
        return _decode_with_pillow(data, notes)
    except ImageError:
        raise
    except Exception as error:
        if fields := bit_fields(data):
            return _read_bit_fields(data, fields, notes.path)
        plain = only_pixels(data)
        if plain is None:
            raise
        try:
            picture = _decode_with_pillow(plain, notes, exif_of(data))
        except Exception:
            raise error from None
        notes.warn(f"what stands beside the pixels is damaged and left out: {error}")
        return picture


def _decode_with_pillow(data: bytes, notes: Notes, exif: bytes = b"") -> Raster:
    """`exif` is that of the file where `data` has none."""
    PILImage.init()
    formats = [name for name in FORMATS if name in PILImage.OPEN]
    with many_pixels(), _opened(data, formats, notes) as image:
        check_size(notes.path, image.height, image.width)
        frames, kind = _count_frames(image), str(image.format)
        image.load()
        if frames > 1:
            notes.warn(f"the first of {frames} pictures is read")
        turn = _orientation((lambda: _parsed(exif)) if exif else image.getexif, exif or exif_of(data), notes)
        return Raster(_colours(image), _alpha(image), _indexes(image), is_lossy(kind, data)).turned(turn)


def _opened(data: bytes, formats: list[str], notes: Notes) -> PILImage.Image:
    with _warnings_of_pillow(notes):
        return PILImage.open(io.BytesIO(data), formats=formats)


@contextmanager
def _warnings_of_pillow(notes: Notes) -> Iterator[None]:
    """Within, Pillow's warnings are not shown, since they name no file; those of damaged EXIF become notes.

    For one thread at a time, as Python has one list of warnings for all; what others warn of meanwhile is passed on.
    """
    with _WARNING, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for each in caught:
        if "PIL" not in Path(each.filename).parts:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
        elif str(each.message).startswith("Corrupt EXIF"):
            notes.warn("the EXIF is damaged; of the orientation is used what it still says")


@contextmanager
def many_pixels() -> Iterator[None]:
    """Within, Pillow opens pictures of as many pixels as are read here, in all threads, without a warning; by default
    it refuses more than websites have."""
    global _inside, _limit
    with _LOCK:
        if not _inside:
            _limit, PILImage.MAX_IMAGE_PIXELS = PILImage.MAX_IMAGE_PIXELS, MOST_PIXELS
        _inside += 1
    try:
        yield
    finally:
        with _LOCK:
            _inside -= 1
            if not _inside:
                PILImage.MAX_IMAGE_PIXELS = _limit


_LOCK, _WARNING = threading.Lock(), threading.Lock()
_inside = 0
_limit: int | None = None


def _count_frames(image: PILImage.Image) -> int:
    """Of an animation; the further pictures of an MPO belong to the first, as depth or the other eye."""
    if image.format == "MPO":
        return 1
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # damage behind the first picture
        return 1


def _orientation(read_exif: Callable[[], PILImage.Exif], raw: bytes, notes: Notes) -> int:
    """1, with a warning, where the EXIF is damaged, whose bytes are `raw`."""
    if raw and raw[:4] not in SIGNATURES:  # which Pillow takes for none
        notes.warn("the EXIF is damaged, and the picture taken as it is stored")
    try:
        with _warnings_of_pillow(notes):
            value = read_exif().get(_ORIENTATION, 1)
    except Exception as error:
        notes.warn(f"the EXIF is damaged, and the picture taken as it is stored: {error}")
        return 1
    return value if value in range(1, 9) else 1


def _stored_orientation(data: bytes, notes: Notes) -> int:
    """Of a file that Pillow has not opened."""
    exif = exif_of(data)
    return _orientation(lambda: _parsed(exif), exif, notes)


def _parsed(exif: bytes) -> PILImage.Exif:
    found = PILImage.Exif()
    found.load(exif)
    return found


def from_pillow(image: PILImage.Image) -> NDArray[np.generic]:
    """The pixels of an image of Pillow, upright: ``[H, W]`` or ``[H, W, 3]``."""
    return turn_upright(_colours(image), _orientation(image.getexif, b"", Notes(Path("image"))))


def _colours(image: PILImage.Image) -> NDArray[Any]:
    """``[H, W]`` or ``[H, W, 3]``; alpha is dropped."""
    if image.mode.startswith(("I", "F")):
        return np.asarray(image)
    if image.mode in ("1", "L", "LA"):
        return np.asarray(image.convert("L"))
    if image.mode == "La":
        return np.asarray(image.convert("LA"))[..., 0]
    if image.mode == "LAB":
        lab = np.asarray(image)
        return lab_to_rgb(lab[..., :1] / 2.55, np.ascontiguousarray(lab[..., 1:]).view(np.int8))
    return np.asarray(image.convert("RGBA") if image.mode == "RGBa" else image.convert("RGB"))[..., :3]


def _alpha(image: PILImage.Image) -> NDArray[np.uint8] | None:
    return np.asarray(image.convert("RGBA"))[..., 3] if image.has_transparency_data else None


def _indexes(image: PILImage.Image) -> NDArray[np.uint8] | None:
    return np.asarray(image) if image.mode == "P" else None


def _read_png16(data: bytes, notes: Notes) -> Raster:
    """Of which Pillow would keep only the upper 8 bits of colour."""
    import imagecodecs

    check_size(notes.path, *(int.from_bytes(data[at : at + 4], "big") for at in (20, 16)))
    stored = np.asarray(imagecodecs.png_decode(only_pixels(data) or data))
    turn = _stored_orientation(data, notes)
    transparent = stored.ndim == 3 and stored.shape[2] in (2, 4)
    return Raster(stored, eight_bits(stored[..., -1], 16) if transparent else None).turned(turn)


def _read_bit_fields(data: bytes, fields: BitFields, path: Path) -> Raster:
    """A BMP whose colours lie where Pillow does not look for them, those that imagecodecs decodes rightly."""
    import imagecodecs

    check_size(path, fields.height, fields.width)
    if not fields.is_whole:
        raise ImageError(f"{path}: damaged or unsupported image: it is truncated")
    if not fields.is_plain:
        masks = ", ".join(f"{mask:#x}" for mask in fields.masks)
        raise ImageError(
            f"{path}: the bit fields {masks} in pixels of {fields.bits} bits are not supported; expected up to 8 bits a"
            " colour, in pixels of 32 bits whole bytes: save it as PNG"
        )
    return Raster(np.asarray(imagecodecs.bmp_decode(data))[..., :3])


def _read_deep_jpeg(data: bytes, frame: JpegFrame, notes: Notes) -> Raster:
    """Of more than 8 bits a sample, which Pillow does not read."""
    import imagecodecs

    check_size(notes.path, frame.height, frame.width)
    if not is_whole_jpeg(data):  # would be filled up without a word
        raise ImageError(f"{notes.path}: damaged or unsupported image: it is truncated")
    stored = np.asarray(imagecodecs.jpeg_decode(data))
    return Raster(stored, lossy=True).turned(_stored_orientation(data, notes))


def _read_heif(data: bytes, path: Path) -> Raster:
    """Turned by its reader. Ten bits and more a colour become 8; those of grey stay."""
    with needs_package(path):
        import pillow_heif
    image = pillow_heif.open_heif(io.BytesIO(data))
    check_size(path, image.size[1], image.size[0])
    pixels = np.asarray(image)
    alpha = np.ascontiguousarray(pixels[..., 3]) if image.mode == "RGBA" else None
    return Raster(pixels, alpha, lossy=True)


def drop_extra_channels(pixels: NDArray[np.generic], name: str) -> NDArray[np.generic]:
    """``[H, W, 1..4]`` -> ``[H, W]`` or ``[H, W, 3]``."""
    if pixels.ndim == 3 and pixels.shape[2] in (1, 2):
        return pixels[..., 0]
    if pixels.ndim == 3 and pixels.shape[2] in (3, 4):
        return pixels[..., :3]
    if pixels.ndim != 2:
        raise ImageError(f"{name}: expected a grey or colour image, got shape {pixels.shape}")
    return pixels
