"""TIFF: which picture of a file is read, and its colours. Through tifffile, and libtiff for what that leaves undecoded.

The picture is the page with the most pixels, the first of several, wherever it stands, also in SubIFDs. Thumbnails,
levels of pyramids and transparency masks are none, if the file marks them as such. Of a stack with several slices,
channels or times, the first is read. A warning says which of the pictures it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from msformer.io.base import ImageError, Notes
from msformer.io.raster import Raster, check_size, eight_bits, turn_upright

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # either byte order, ordinary and BigTIFF

_LOSSY = ("JPEG", "OJPEG", "JPEG_LOSSY", "JPEG_2000_LOSSY", "JPEGXR_NDPI", "APERIO_JP2000_YCBC", "APERIO_JP2000_RGB")

_FOR_LIBTIFF = ("OJPEG", "THUNDERSCAN", "NEXT", "SGILOG", "SGILOG24")

_COLOURS_FOR_LIBTIFF = ("ITULAB", "LOGL", "LOGLUV")

_BRADFORD = np.array(  # from XYZ of D50, the white of TIFF's CIELAB, to that of D65, the white of sRGB
    [[0.9555766, -0.0230393, 0.0631636], [-0.0282895, 1.0099416, 0.0210077], [0.0122982, -0.0204830, 1.3299098]]
)


def read_tiff(notes: Notes) -> Raster:
    """The picture of a TIFF file: RGB of 8 bits where it has a palette, CMYK, CIELAB or YCbCr, else as stored.

    Args:
        notes: of the file, for what is assumed and left out.

    Raises:
        ImageError: no picture, too large a one, colours that are not supported.
        Exception: whatever decoders raise on a damaged file.
    """
    import tifffile

    path = notes.path
    with tifffile.TiffFile(path) as tiff:
        page = _main_page(tiff, notes)
        check_size(path, page.imagelength, page.imagewidth, page.samplesperpixel * max(page.imagedepth, 1))
        picture = replace(_decode(page, notes), lossy=page.compression.name in _LOSSY)
        return picture.turned(_orientation(page))


def _main_page(tiff: Any, notes: Notes) -> Any:
    """The page to read; warns of pictures that are left out."""
    pages = list(_pages(tiff.pages, notes))
    if not pages:
        raise ImageError(f"{notes.path}: holds no picture")
    whole = [page for page in pages if not page.is_reduced and not page.is_mask] or pages
    main = max(whole, key=lambda page: page.imagelength * page.imagewidth)
    levels, planes = _series(tiff, main)
    pictures = [page for page in whole if page is main or page.offset not in levels]
    if pictures[0] is not main:
        place = pictures.index(main) + 1
        notes.warn(f"page {place} of {len(pictures)}, the largest, is read")
    elif len(pictures) > 1:
        notes.warn(f"the first of {len(pictures)} pages is read")
    elif planes > 1:
        notes.warn(f"the first of {planes} planes is read")
    return main


def _pages(pages: Any, notes: Notes) -> Iterator[Any]:
    """All pages with pixels, those of SubIFDs behind their own; ends with a warning where the chain is damaged."""
    for number in range(len(pages)):
        try:
            page = pages[number]
            below = page.pages
        except Exception as error:  # must not hide the pages before it
            notes.warn(f"page {number + 1} is damaged and left out: {error}")
            continue
        if page.imagelength and page.imagewidth and page.dataoffsets:
            yield page
        if below is not None:
            yield from _pages(below, notes)


def _series(tiff: Any, page: Any) -> tuple[set[int], int]:
    """What tifffile knows of the data set that a page belongs to: where pages lie that are levels of its pyramid, and
    how many pictures of its size there are without a page for each, as in ImageJ's stacks."""
    try:
        series = next(series for series in tiff.series if any(found is page for found in series.pages))
        levels = {below.offset for level in series.levels[1:] for below in level.pages if below is not None}
        planes = int(np.prod(series.shape)) // int(np.prod(page.shape))
    except Exception:  # descriptions may be damaged where pixels are not
        levels, planes = set(), 1
    return levels, max(planes, 1) * max(page.imagedepth, 1)


def _orientation(page: Any) -> int:
    tag = page.tags.get("Orientation")
    return tag.value if tag is not None and tag.value in range(1, 9) else 1


def _decode(page: Any, notes: Notes) -> Raster:
    """A page as it lies in the file, not turned."""
    path = notes.path
    colour, codec = getattr(page.photometric, "name", ""), page.compression.name
    if colour == "CFA":
        raise ImageError(f"{path}: the raw values of a camera's sensor (colour filter array) are not supported")
    converted = codec in ("JPEG", "WEBP", "JPEG2000", "JPEGXL", "JPEGXR", "APERIO_JP2000_YCBC")
    if codec in _FOR_LIBTIFF or colour in _COLOURS_FOR_LIBTIFF or (colour == "YCBCR" and not converted):
        return Raster(_decode_with_libtiff(page, path))
    samples = _samples_last(np.asarray(page.asarray()), page)
    if codec == "APERIO_JP2000_YCBC" or (colour == "YCBCR" and page.axes == "SYX"):  # planes for themselves
        samples = np.ascontiguousarray(samples)
        return Raster(np.asarray(PILImage.fromarray(samples, "YCbCr").convert("RGB")))
    alpha = _alpha(page, samples)
    if colour == "PALETTE":
        indexes = samples.reshape(*samples.shape[:2], -1)[..., 0]
        if page.bitspersample < 8:
            indexes = indexes.astype(np.uint8) & (2**page.bitspersample - 1)
        return Raster(_colour_map(page, notes)[indexes], alpha, indexes)
    if colour == "SEPARATED":
        return Raster(_from_cmyk(samples, page, path), alpha)
    if colour in ("CIELAB", "ICCLAB") and samples.ndim == 3 and samples.shape[2] >= 3:
        return Raster(_from_lab(samples[..., :3], icc=colour == "ICCLAB"), alpha)
    return Raster(_grey_or_rgb(samples, page, notes, inverted=colour == "MINISWHITE"), alpha)


def _samples_last(stored: NDArray[Any], page: Any) -> NDArray[Any]:
    """``[H, W]`` or ``[H, W, samples]`` of what tifffile names by axes, the first of several slices."""
    axes = page.axes
    while "Z" in axes:
        stored, axes = stored.take(0, axis=axes.index("Z")), axes.replace("Z", "")
    return np.moveaxis(stored, 0, -1) if axes == "SYX" else stored


def _alpha(page: Any, samples: NDArray[Any]) -> NDArray[np.uint8] | None:
    """The first sample that is known to be alpha."""
    if samples.ndim == 2 or samples.dtype.kind != "u":
        return None
    extra = [int(kind) for kind in page.extrasamples]
    place = next((number for number, kind in enumerate(extra) if kind in (1, 2)), None)
    if place is None:
        return None
    return eight_bits(samples[..., samples.shape[2] - len(extra) + place], page.bitspersample)


def _colour_map(page: Any, notes: Notes) -> NDArray[np.uint8]:
    """The palette ``[colours, 3]``, of which TIFF has 16 bits and some writers fill the lower 8 alone."""
    colours = np.asarray(page.colormap).T
    if 0 < colours.max() < 256:
        notes.warn("the palette of 16 bits has values of 8 bits, and is taken as one of 8")
        return colours.astype(np.uint8)
    return eight_bits(colours, 16)


def _from_cmyk(samples: NDArray[Any], page: Any, path: Path) -> NDArray[np.uint8]:
    if samples.ndim == 2 or samples.shape[2] < 4 or samples.dtype.kind != "u":
        raise ImageError(f"{path}: expected the four inks of CMYK, got shape {samples.shape} of {samples.dtype}")
    inks = np.ascontiguousarray(eight_bits(samples[..., :4], page.bitspersample))
    return np.asarray(PILImage.fromarray(inks, "CMYK").convert("RGB"))


def _from_lab(stored: NDArray[Any], icc: bool) -> NDArray[np.uint8]:
    """CIELAB of D50, 8 or 16 bits, as TIFF 6.0 (page 110) or ICC profiles encode it -> sRGB."""
    rgb = np.empty(stored.shape, np.uint8)
    for start in range(0, len(stored), 256):  # a whole slide in floating point would not fit
        part = stored[start : start + 256]
        unit = part.dtype.itemsize * 8 - 8  # bits behind the binary point of a* and b*
        white = (255 << unit) if icc or unit == 0 else 65535
        chroma = part[..., 1:].astype(np.int32)
        chroma = chroma - (128 << unit) if icc else np.where(chroma >= 128 << unit, chroma - (256 << unit), chroma)
        rgb[start : start + 256] = lab_to_rgb(part[..., :1] * (100 / white), chroma / (1 << unit))
    return rgb


def lab_to_rgb(lightness: NDArray[Any], chroma: NDArray[Any]) -> NDArray[np.uint8]:
    """L* ``[..., 1]`` from 0 to 100 and a*, b* ``[..., 2]``, of the white D50 -> sRGB ``[..., 3]``, which has D65."""
    from skimage.color import lab2xyz, xyz2rgb

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of colours that no light has
        xyz = lab2xyz(np.concatenate([lightness, chroma], axis=-1), illuminant="D50")
    rgb = xyz2rgb(xyz @ _BRADFORD.T)
    return np.asarray(np.rint(rgb.clip(0, 1) * 255), np.uint8)


def _grey_or_rgb(samples: NDArray[Any], page: Any, notes: Notes, inverted: bool) -> NDArray[Any]:
    if samples.dtype.kind == "c":
        raise ImageError(f"{notes.path}: expected real numbers, got {samples.dtype}")
    if samples.ndim == 3 and getattr(page.photometric, "name", "") == "RGB":
        samples = samples[..., :3]
    if samples.ndim == 3 and samples.shape[2] > 4:
        notes.warn(f"the first of {samples.shape[2]} channels is read")
        samples = samples[..., 0]
    bits = page.bitspersample
    if samples.dtype == np.bool_ or bits < 8:
        samples = eight_bits(samples, bits)
        bits = 8
    if inverted:
        samples = _inverted(samples, bits)
    return _without_gaps(samples, page, notes)


def _inverted(samples: NDArray[Any], bits: int) -> NDArray[Any]:
    """White-is-zero turned around: integers within their bits, other numbers within what the picture has."""
    if samples.dtype.kind == "u":
        return samples.dtype.type(2**bits - 1) - samples
    if samples.dtype.kind == "i":
        return ~samples
    return np.nanmax(samples) + np.nanmin(samples) - samples


def _without_gaps(samples: NDArray[Any], page: Any, notes: Notes) -> NDArray[Any]:
    """NaN, and the value that GDAL writes for missing pixels, become the lowest of the others."""
    gaps = np.isnan(samples) if samples.dtype.kind == "f" else np.zeros(samples.shape, np.bool_)
    if "GDAL_NODATA" in page.tags:
        gaps |= samples == page.nodata
    if not gaps.any() or gaps.all():
        return samples
    notes.warn(f"{gaps.sum()} missing values are shown as the lowest")
    return np.where(gaps, samples[~gaps].min(), samples)


def _decode_with_libtiff(page: Any, path: Path) -> NDArray[np.uint8]:
    """RGB. What is missing from a file libtiff fills with black, so that is looked for before."""
    import imagecodecs

    size = path.stat().st_size
    if any(start + count > size for start, count in zip(page.dataoffsets, page.databytecounts, strict=False)):
        raise ImageError(f"{path}: damaged or unsupported image: it is truncated")
    if not isinstance(page.index, int):
        raise ImageError(f"{path}: {page.photometric.name} in a subfile is not supported")
    rgba = np.asarray(imagecodecs.tiff_decode(path.read_bytes(), page.index, asrgb=True))
    # it mirrors the picture as the orientation says, but does not turn it
    return turn_upright(rgba[..., :3], {2: 2, 3: 3, 4: 4, 6: 2, 7: 3, 8: 4}.get(_orientation(page), 1))
