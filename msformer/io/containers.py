"""What the bytes of a picture file say before anything is decoded: its kind, its EXIF, and the file without all that
stands beside the pixels, for decoders that refuse a picture because of a damaged comment.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import NamedTuple

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_WEBP_KEPT = (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF")
_PICTURES = (_PNG, b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_FRAMES = [bytes([marker]) for marker in range(0xC0, 0xD0) if marker not in (0xC4, 0xC8, 0xCC)]
_AVIF = (b"avif", b"avis")
_BYTES = tuple(0xFF << shift for shift in (0, 8, 16, 24))
_EXIF = b"Exif\0\0"


class Part(NamedTuple):
    """A chunk or segment of a file."""

    kind: bytes
    """The name of a chunk; the marker of a JPEG segment, without 0xFF."""
    content: bytes
    whole: bytes
    """With what stands around the content."""


def is_picture(path: str | PathLike[str]) -> bool:
    """Whether a file starts as PNG, JPEG, GIF, TIFF or WebP; False for what cannot be opened."""
    try:
        with Path(path).open("rb") as file:
            head = file.read(12)
    except OSError:
        return False
    return head.startswith(_PICTURES) or (head[:4] == b"RIFF" and head[8:] == b"WEBP")


def is_heif(head: bytes) -> bool:
    """Of the first 32 bytes of a file; AVIF, which has the same container, is not meant."""
    if head[4:8] != b"ftyp":
        return False
    brands = [head[8:12], *(head[at : at + 4] for at in range(16, min(len(head), struct.unpack(">I", head[:4])[0]), 4))]
    return not any(brand in _AVIF for brand in brands) and any(
        brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1") for brand in brands
    )


def is_lossy(kind: str, data: bytes) -> bool:
    """Whether the codec changed values, as far as the file tells; `kind` is Pillow's name of the format."""
    if kind == "WEBP":
        return any(part.kind == b"VP8 " for part in _webp_chunks(data)) or b"VP8L" not in data
    return kind in ("JPEG", "MPO", "AVIF")


class JpegFrame(NamedTuple):
    """What the start of a JPEG's frame says."""

    bits: int
    """Of a sample."""
    height: int
    width: int


def jpeg_frame(data: bytes) -> JpegFrame | None:
    """None where there is none."""
    frame = next((part for part in _jpeg_segments(data) if part.kind in _FRAMES and len(part.content) >= 5), None)
    return JpegFrame(*struct.unpack(">BHH", frame.content[:5])) if frame is not None else None


class BitFields(NamedTuple):
    """Where the colours lie in the pixels of a BMP."""

    bits: int
    """Of a pixel."""
    masks: tuple[int, int, int]
    """Of red, green and blue."""
    height: int
    width: int
    is_whole: bool
    """Whether all pixels are there."""

    @property
    def is_plain(self) -> bool:
        """Whether each mask is one run of at most 8 bits, in pixels of 32 bits a whole byte, and none meets another."""
        runs = [f"{mask:b}".strip("0") for mask in self.masks]
        apart = sum(self.masks) == self.masks[0] | self.masks[1] | self.masks[2] < 1 << self.bits
        if not apart or any("0" in run or not 1 <= len(run) <= 8 for run in runs):
            return False
        return self.bits == 16 or (self.bits == 32 and all(mask in _BYTES for mask in self.masks))


def bit_fields(data: bytes) -> BitFields | None:
    """Those of a BMP that has some; None for any other file."""
    if not data.startswith(b"BM") or len(data) < 66:
        return None
    start, header, width, height, _, bits, compression = struct.unpack("<IIiiHHI", data[10:34])
    if header < 40 or compression not in (3, 6):
        return None
    row = (width * bits + 31) // 32 * 4
    whole = width > 0 and len(data) >= start + row * abs(height)
    return BitFields(bits, struct.unpack("<3I", data[54:66]), abs(height), width, whole)


def is_whole_jpeg(data: bytes) -> bool:
    """Whether the end of the picture is there."""
    return data.rstrip(b"\0\r\n ").endswith(b"\xff\xd9")


def exif_of(data: bytes) -> bytes:
    """The EXIF of a PNG, JPEG or WebP, which starts with the byte order; b"" if there is none."""
    if data[:4] == b"RIFF":
        at = data.rfind(b"EXIF")
        return data[at + 8 :].removeprefix(_EXIF) if at >= 0 else b""
    if data.startswith(_PNG):
        return next((part.content for part in _png_chunks(data) if part.kind == b"eXIf"), b"").removeprefix(_EXIF)
    found = (part.content for part in _jpeg_segments(data) if part.kind == b"\xe1" and part.content.startswith(_EXIF))
    return next(found, b"").removeprefix(_EXIF)


def only_pixels(data: bytes) -> bytes | None:
    """The file without colour profiles, EXIF, texts and the like; None for kinds that are not known here."""
    if data.startswith(_PNG):
        return _PNG + b"".join(part.whole for part in _png_chunks(data) if part.kind in _PNG_KEPT)
    if data.startswith(b"\xff\xd8"):
        kept = [part.whole for part in _jpeg_segments(data) if _is_of_pixels(part)]
        return b"\xff\xd8" + b"".join(kept)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        chunks = b"".join(part.whole for part in _webp_chunks(data) if part.kind in _WEBP_KEPT)
        return b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WEBP" + chunks
    return None


def _png_chunks(data: bytes) -> Iterator[Part]:
    at = len(_PNG)
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        if at + 12 + length > len(data) or not kind.isalpha():
            return
        yield Part(kind, data[at + 8 : at + 8 + length], data[at : at + 12 + length])
        at += 12 + length


def _jpeg_segments(data: bytes) -> Iterator[Part]:
    """Up to the first scan, which is one with everything behind it. Lengths that lead nowhere are not followed."""
    at = 2
    while 0 <= at < len(data) - 4:
        if data[at] != 0xFF or data[at + 1] in (0x00, 0xFF):
            at += 1
            continue
        kind, end = data[at + 1 : at + 2], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if kind == b"\xda":
            yield Part(kind, b"", data[at:])
            return
        if end >= len(data):  # the tables of the picture come next
            at = data.find(b"\xff\xdb", at + 2)
            continue
        yield Part(kind, data[at + 4 : end], data[at:end])
        at = end


def _is_of_pixels(part: Part) -> bool:
    """Whether a segment is needed to decode: no application's but those that say how colours are meant."""
    if part.kind == b"\xe0":
        return part.content.startswith(b"JFIF") and len(part.content) >= 14
    if part.kind == b"\xee":
        return part.content.startswith(b"Adobe") and len(part.content) >= 12
    return not (0xE0 <= part.kind[0] <= 0xEF or part.kind == b"\xfe")


def _webp_chunks(data: bytes) -> Iterator[Part]:
    at = 12
    while at + 8 <= len(data):
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        end = at + 8 + length + length % 2
        if at + 8 + length > len(data):
            return
        yield Part(data[at : at + 4], data[at + 8 : at + 8 + length], data[at:end])
        at = end
