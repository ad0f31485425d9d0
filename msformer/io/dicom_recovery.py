"""Finding the pixels of a damaged DICOM file by tags, where its elements cannot be read one after the other."""

from __future__ import annotations

import struct
from typing import Any

_WANTED = (
    *("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue"),
    *("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth", "VOILUTFunction", "PresentationLUTShape"),
    *("PixelSpacing", "SliceThickness", "ImagePositionPatient", "ImageOrientationPatient", "Modality"),
    *(f"{name}PaletteColorLookupTable{part}" for name in ("Red", "Green", "Blue") for part in ("Descriptor", "Data")),
)
_PIXELS = struct.pack("<HH", 0x7FE0, 0x0010)
_ITEM, _END = struct.pack("<HH", 0xFFFE, 0xE000), struct.pack("<HH", 0xFFFE, 0xE0DD)
_UNDEFINED = 0xFFFFFFFF
_LONG = (b"OB", b"OW", b"UN")
_MOST = 1 << 17
"""Bytes of an element that is not the pixels."""


def items_by_length(content: bytes) -> bytes | None:
    """The items that begin here, up to the delimiter after them; None if they do not follow one another.

    What looks like a delimiter inside an item, as bytes of a compressed picture may, ends nothing.
    """
    place = 0
    while content[place : place + 4] == _ITEM and place + 8 <= len(content):
        length = struct.unpack_from("<I", content, place + 4)[0]
        if place + 8 + length > len(content):
            return None
        place += 8 + length
    return content[:place] if place and content[place : place + 4] in (_END, b"") else None


def count_items(content: bytes) -> int:
    """How many items begin here, one after the other."""
    place = count = 0
    while content[place : place + 4] == _ITEM and place + 8 <= len(content):
        place, count = place + 8 + int(struct.unpack_from("<I", content, place + 4)[0]), count + 1
    return count


def recover(content: bytes, pydicom: Any) -> Any:
    """A data set of the elements that a picture needs, of a little-endian file; None without pixels or their size."""
    for explicit in (True, False):
        found = _find_pixels(content, explicit)
        if found is None:
            continue
        end, kind, value = found
        dataset = pydicom.dataset.FileDataset(None, {}, file_meta=_meta(content, pydicom))
        dataset.set_original_encoding(not explicit, True)
        for keyword in _WANTED:
            element = _find(content[:end], keyword, explicit, pydicom)
            if element is not None:
                dataset[element.tag] = element
        tag = pydicom.tag.Tag(0x7FE0, 0x0010)
        dataset[tag] = pydicom.dataelem.RawDataElement(tag, kind, len(value), value, end, not explicit, True)
        if "Rows" in dataset and "Columns" in dataset:
            return dataset
    return None


def _find_pixels(content: bytes, explicit: bool) -> tuple[int, str, bytes] | None:
    """Where the last element of pixels begins, its kind and its value."""
    place = len(content)
    while (place := content.rfind(_PIXELS, 0, place)) >= 0:
        kind = content[place + 4 : place + 6] if explicit else b"OW"
        start = place + (12 if explicit else 8)
        if kind in _LONG and start <= len(content):
            length = struct.unpack_from("<I", content, start - 4)[0]
            value = items_by_length(content[start:]) if length == _UNDEFINED else content[start : start + length]
            if value and (length == _UNDEFINED or start + length <= len(content)):
                return place, kind.decode(), value
    return None


def _find(content: bytes, keyword: str, explicit: bool, pydicom: Any) -> Any:
    """The first element of a keyword that can be one, as later ones are of icons; None if there is none."""
    tag = pydicom.tag.Tag(pydicom.datadict.tag_for_keyword(keyword))
    usual = pydicom.datadict.dictionary_VR(tag)
    pattern, place = struct.pack("<HH", tag.group, tag.element), -1
    while (place := content.find(pattern, place + 1)) >= 0:
        kind = content[place + 4 : place + 6]
        if explicit and kind in _LONG and place + 12 <= len(content):
            start, length = place + 12, struct.unpack_from("<I", content, place + 8)[0]
        elif explicit and kind.decode("latin-1") in usual.split(" or ") and place + 8 <= len(content):
            start, length = place + 8, struct.unpack_from("<H", content, place + 6)[0]
        elif not explicit and place + 8 <= len(content):
            start, length = place + 8, struct.unpack_from("<I", content, place + 4)[0]
        else:
            continue
        if 0 < length <= _MOST and length % 2 == 0 and start + length <= len(content):
            name = kind.decode("latin-1") if explicit else None
            value = content[start : start + length]
            return pydicom.dataelem.RawDataElement(tag, name, length, value, start, not explicit, True)
    return None


def _meta(content: bytes, pydicom: Any) -> Any:
    """File meta information with the transfer syntax, if that can be found."""
    meta = pydicom.dataset.FileMetaDataset()
    element = _find(content, "TransferSyntaxUID", True, pydicom)
    if element is not None:
        meta.TransferSyntaxUID = element.value.decode("latin-1").strip(" \0")
    return meta
