"""Decoding a frame of a DICOM file, through pydicom, and through imagecodecs what pydicom cannot decode.

pydicom is given a data set that holds the pixels and their layout alone, so that no other element, however damaged, is
in its way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msformer.io.base import ImageError, Notes
from msformer.io.dicom_file import DicomFile
from msformer.io.dicom_streams import decode_stream, has_items, syntax_of
from msformer.io.dicom_values import Values

_MONOCHROME = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
_COLOUR = (
    *("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"),
    *("YBR_PARTIAL_422", "YBR_PARTIAL_420"),
)


@dataclass(frozen=True)
class Layout:
    """How pixels are stored; the names are those of DICOM."""

    rows: int
    columns: int
    samples: int
    planar: int
    photometric: str
    allocated: int
    stored: int
    high: int
    signed: bool

    @property
    def grey(self) -> bool:
        return self.samples == 1


def read_layout(file: DicomFile, values: Values, notes: Notes) -> Layout:
    """The layout, where elements are missing as the standard has it by default, or as what is there suggests.

    Raises:
        ImageError: no size, or a photometric interpretation that is not supported.
    """
    path, float_pixels = file.path, file.pixels.tag != 0x7FE00010
    rows, columns = (int(values.number(keyword) or 0) for keyword in ("Rows", "Columns"))
    if rows < 1 or columns < 1:
        raise ImageError(f"{path}: expected a picture with rows and columns, got {rows} x {columns}")
    photometric, given = values.text("PhotometricInterpretation").upper(), values.number("SamplesPerPixel")
    samples = int(given) if given in (1, 3) else 3 if photometric in _COLOUR else 1
    if given not in (1, 3):
        notes.warn(f"SamplesPerPixel: expected 1 or 3, got {given or 'nothing'}; {samples} is assumed")
    if photometric and photometric not in (*_MONOCHROME, *_COLOUR):
        raise ImageError(f"{path}: unsupported photometric interpretation {photometric}")
    if photometric not in (_MONOCHROME if samples == 1 else _COLOUR):
        assumed = "MONOCHROME2" if samples == 1 else "RGB"
        got = f"got {photometric or 'nothing'} with {samples} sample(s) a pixel"
        notes.warn(f"PhotometricInterpretation: {got}; {assumed} is assumed")
        photometric = assumed
    allocated = int(values.number("BitsAllocated") or 0)
    if not (allocated == 1 or (allocated % 8 == 0 and 8 <= allocated <= 64)):
        found = _allocated(file, rows * columns * samples)
        notes.warn(f"BitsAllocated: expected 1, 8, 16, 32 or 64, got {allocated or 'nothing'}; {found} is assumed")
        allocated = found
    stored = allocated if float_pixels else _bits(values, "BitsStored", allocated, allocated, notes)
    high = stored - 1 if float_pixels else _bits(values, "HighBit", stored - 1, allocated - 1, notes)
    high = stored - 1 if high < stored - 1 or has_items(file.pixels) else high
    planar = values.number("PlanarConfiguration")
    if samples == 3 and planar not in (0, 1) and not has_items(file.pixels):
        notes.warn(f"PlanarConfiguration: expected 0 or 1, got {'nothing' if planar is None else planar}; 0 is assumed")
    if values.number("PixelRepresentation") not in (0, 1) and not float_pixels:
        notes.warn("PixelRepresentation: expected 0 or 1, got nothing or another; values are taken as unsigned")
    return Layout(rows, columns, samples, int(planar == 1), photometric, allocated, stored, high, values.signed)


def _allocated(file: DicomFile, count: int) -> int:
    """The bits of each of `count` samples of a frame, by the length of the pixels; 16 where they are compressed."""
    bits = 16 if has_items(file.pixels) else len(file.pixels.value) * 8 // (count * file.frames)
    return next((whole for whole in (64, 32, 16, 8, 1) if bits >= whole), 8)


def _bits(values: Values, keyword: str, usual: int, most: int, notes: Notes) -> int:
    found = values.number(keyword)
    if found is not None and (0 if keyword == "HighBit" else 1) <= found <= most:
        return int(found)
    got = "nothing" if found is None else int(found)
    notes.warn(f"{keyword}: expected a number up to {most}, got {got}; {usual} is assumed")
    return usual


def decode(file: DicomFile, layout: Layout, index: int, notes: Notes) -> NDArray[Any]:
    """A frame before any rescaling: ``[H, W]``, or RGB ``[H, W, 3]``.

    Raises:
        ImageError: the pixels cannot be decoded.
    """
    syntax = _syntax(file, notes)
    pixels: NDArray[Any] | None
    try:
        pixels = _with_pydicom(file, layout, index, syntax)
    except Exception as error:  # decoders raise whatever they like
        pixels = None if not has_items(file.pixels) else decode_stream(file.pixels.value, index, file.frames)
        if pixels is None:
            from pydicom.uid import UID

            reason = " ".join(str(error).split())
            name = UID(syntax).name
            raise ImageError(f"{file.path}: the pixels (transfer syntax {name}) cannot be decoded: {reason}") from error
    if pixels.shape[:2] != (layout.rows, layout.columns) or pixels.ndim != (2 if layout.grey else 3):
        size = " x ".join(map(str, (layout.rows, layout.columns, *([] if layout.grey else [layout.samples]))))
        raise ImageError(f"{file.path}: expected pixels of shape {size}, got {pixels.shape}")
    if layout.photometric.startswith("YBR_PARTIAL") and not has_items(file.pixels):
        return _from_partial_range(pixels, layout.stored)
    return _used_bits(pixels, layout) if pixels.dtype.kind in "iu" else pixels


def _syntax(file: DicomFile, notes: Notes) -> str:
    """The transfer syntax: as the file says, if its pixels agree, else as they are."""
    said = str(getattr(file.dataset, "file_meta", {}).get("TransferSyntaxUID") or "").strip(" \0")
    found = syntax_of(file.pixels, file.dataset, said)
    if found != said:
        notes.warn(f"TransferSyntaxUID: the file says {said or 'nothing'}; its pixels are read as {found}")
    return found


def _with_pydicom(file: DicomFile, layout: Layout, index: int, syntax: str) -> NDArray[Any]:
    from pydicom.dataelem import DataElement
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.pixels import pixel_array
    from pydicom.uid import UID

    plain, element = Dataset(), file.pixels
    plain.file_meta = FileMetaDataset()
    plain.file_meta.TransferSyntaxUID = UID(syntax)
    plain.Rows, plain.Columns, plain.NumberOfFrames = layout.rows, layout.columns, file.frames
    plain.SamplesPerPixel, plain.PlanarConfiguration = layout.samples, layout.planar
    plain.PhotometricInterpretation = layout.photometric
    whole = not has_items(element) and not layout.photometric.startswith("YBR")  # bits are chosen in `_used_bits`
    stored = layout.allocated if whole else layout.stored
    plain.BitsAllocated, plain.BitsStored, plain.HighBit = layout.allocated, stored, stored - 1
    plain.PixelRepresentation = int(layout.signed)
    for keyword in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths"):
        if keyword in file.dataset:
            setattr(plain, keyword, file.dataset[keyword].value)
    kind = element.VR if element.VR in ("OB", "OW", "OF", "OD") else "OW"
    plain[element.tag] = DataElement(element.tag, kind, element.value)
    partial = layout.photometric.startswith("YBR_PARTIAL")
    if partial:  # of the layout that pydicom knows; the range of values is another
        plain.PhotometricInterpretation = "YBR_FULL_422"
    return pixel_array(plain, index=index, raw=partial)


def _used_bits(pixels: NDArray[Any], layout: Layout) -> NDArray[Any]:
    """Stored values without what lies in the other bits, such as overlays; signed ones with their sign."""
    wide = pixels.dtype.itemsize * 8
    if layout.stored >= wide:
        return pixels if pixels.dtype.kind == ("i" if layout.signed else "u") else pixels.view(_type(pixels, layout))
    shift = min(max(layout.high + 1 - layout.stored, 0), wide - layout.stored)
    values = pixels.view(f"u{pixels.dtype.itemsize}") << (wide - layout.stored - shift)
    return values.view(_type(pixels, layout)) >> (wide - layout.stored)  # which fills in the sign


def _type(pixels: NDArray[Any], layout: Layout) -> str:
    return f"{'i' if layout.signed else 'u'}{pixels.dtype.itemsize}"


def _from_partial_range(pixels: NDArray[Any], bits: int) -> NDArray[np.unsignedinteger[Any]]:
    """Video's YCbCr, of 8 bits from 16 to 235 or 240, to RGB (PS3.3, C.7.6.3.1.2)."""
    scale = 2 ** (bits - 8)
    luma = (pixels[..., 0] / scale - 16) * 255 / 219
    blue, red = ((pixels[..., i] / scale - 128) * 255 / 224 for i in (1, 2))
    rgb = np.stack([luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue], axis=-1)
    return np.clip(np.rint(rgb * scale), 0, 2**bits - 1).astype(pixels.dtype)
