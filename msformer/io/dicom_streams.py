"""Compressed pixels of DICOM files: which kind they are by their first bytes, and decoding what pydicom cannot.

Through imagecodecs: JPEG of 12 bits (processes 2 and 4), high-throughput JPEG 2000, JPEG XL, and the others where
pydicom's decoders are missing or refuse a stream.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_IMPLICIT, _EXPLICIT, _BIG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
_DEFLATED = "1.2.840.10008.1.2.1.99"
_NATIVE = (_IMPLICIT, _EXPLICIT, _BIG, _DEFLATED, "1.2.840.113619.5.2")

_JPEG = "1.2.840.10008.1.2.4."
_BASELINE, _EXTENDED, _LOSSLESS, _JPEG_LS, _JPEG_2000, _JPEG_XL = (
    f"{_JPEG}{end}" for end in ("50", "51", "70", "81", "91", "112")
)
_RLE = "1.2.840.10008.1.2.5"

_FAMILIES: dict[str, tuple[str, ...]] = {
    _BASELINE: (_BASELINE, _EXTENDED),
    _EXTENDED: (_BASELINE, _EXTENDED),
    _LOSSLESS: (f"{_JPEG}57", _LOSSLESS),
    _JPEG_LS: (f"{_JPEG}80", _JPEG_LS),
    _JPEG_2000: tuple(f"{_JPEG}{end}" for end in ("90", "91", "92", "93", "201", "202", "203")),
    _JPEG_XL: tuple(f"{_JPEG}{end}" for end in ("110", "111", "112")),
    _RLE: (_RLE,),
}
"""By the transfer syntax that is assumed for a stream, those that may be said of it."""

_START_OF_FRAME = {0xC0: _BASELINE, 0xC1: _EXTENDED, 0xC2: _EXTENDED, 0xC3: _LOSSLESS, 0xF7: _JPEG_LS}


def has_items(element: Any) -> bool:
    """Whether the pixels of this element are compressed: they begin with an item, and not in a file of native ones."""
    return bool(element.value[:4] == b"\xfe\xff\x00\xe0") and getattr(element, "VR", "OB") != "OF"


def syntax_of(element: Any, dataset: Any, said: str) -> str:
    """The transfer syntax that these pixels have: what is said, if they may have it."""
    if not has_items(element):
        if said in _NATIVE:
            return said
        implicit, little = getattr(dataset, "original_encoding", (False, True))
        return _BIG if little is False else _IMPLICIT if implicit else _EXPLICIT
    frame = _frame(element.value, 0, 1)
    found = None if frame is None else _kind_of(frame)
    if found is None:
        return said or _RLE
    return said if said in _FAMILIES[found] else found


def _kind_of(stream: bytes) -> str | None:
    """The transfer syntax of a stream by its first bytes; None if it is of no known kind."""
    if stream.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ")):
        return _JPEG_2000
    if stream.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return _JPEG_XL
    if stream.startswith(b"\xff\xd8"):
        place = 2
        while place + 4 <= len(stream) and stream[place] == 0xFF:
            marker = stream[place + 1]
            if marker in _START_OF_FRAME:
                return _START_OF_FRAME[marker]
            place += 1 if marker == 0xFF else 2 + int(struct.unpack_from(">H", stream, place + 2)[0])
        return _BASELINE
    segments = struct.unpack_from("<16I", stream) if len(stream) >= 64 else (0,)
    is_rle = 1 <= segments[0] <= 15 and segments[1] == 64 and not any(segments[segments[0] + 1 :])
    return _RLE if is_rle else None


def _frame(value: bytes, index: int, frames: int) -> bytes | None:
    from pydicom.encaps import get_frame

    try:
        return get_frame(value, index, number_of_frames=frames)
    except Exception:  # whatever is raised on damaged items
        return None


def decode_stream(value: bytes, index: int, frames: int) -> NDArray[np.integer[Any]] | None:
    """A frame of compressed pixels ``[H, W]`` or ``[H, W, 3]``; None if it cannot be decoded here, either."""
    import imagecodecs

    frame = _frame(value, index, frames)
    decoders: dict[str | None, Callable[[bytes], Any]] = {
        _BASELINE: imagecodecs.jpeg8_decode,
        _EXTENDED: imagecodecs.jpeg8_decode,
        _LOSSLESS: imagecodecs.ljpeg_decode,
        _JPEG_LS: imagecodecs.jpegls_decode,
        _JPEG_2000: imagecodecs.jpeg2k_decode,
        _JPEG_XL: imagecodecs.jpegxl_decode,
    }
    decoder = None if frame is None else decoders.get(_kind_of(frame))
    if frame is None or decoder is None:
        return None
    try:
        return np.asarray(decoder(frame))
    except Exception:  # decoders raise whatever they like
        return None
