"""Look-up tables of DICOM files: modality, values of interest, palettes (PS3.3, C.11.1, C.11.2, C.7.6.3, C.7.9)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from msformer.io.base import Notes
from msformer.io.dicom_values import Values
from msformer.io.voi import Table

_MOST = 65536
"""Entries, which a descriptor writes as 0."""
_DISCRETE, _LINEAR, _INDIRECT = 0, 1, 2


def read_table(values: Values, prefix: str, notes: Notes, signed: bool) -> Table | None:
    """The table whose elements have names that begin with `prefix`, such as LUT; None if there is none.

    Args:
        signed: whether the integers that it is for may be negative.
    """
    descriptor = values.numbers(f"{prefix}Descriptor", 3)
    if not descriptor.size:
        return None
    count, first, bits = (int(number) for number in descriptor)
    count = count % _MOST or _MOST
    first %= _MOST  # some files write negative numbers as unsigned ones, or the other way round
    if signed and first >= _MOST // 2:
        first -= _MOST
    if not 8 <= bits <= 16:
        notes.warn(f"{prefix}Descriptor: expected entries of 8 to 16 bits, got {bits}")
        bits = 8 if 0 < bits < 8 else 16
    entries, bits = _entries(values, prefix, count, bits, notes)
    if not entries.size:
        return None
    if entries.size < count:
        notes.warn(f"{prefix}Descriptor: expected {count} entries, got {entries.size}; the last holds beyond them")
    return Table(first, entries[:count], bits)


def _entries(values: Values, prefix: str, count: int, bits: int, notes: Notes) -> tuple[NDArray[np.uint16], int]:
    """The entries of a table, and their bits, which the descriptor may say wrongly."""
    plain = values.data(f"{prefix}Data", 8)
    if not plain.size:
        return _expanded(values, prefix, bits, notes), bits
    if bits == 8 and plain.size < 2 * count:  # one a byte, and a byte more where their number is odd
        return plain, bits
    words = values.data(f"{prefix}Data", 16)
    if bits > 8 and words.size < count <= plain.size:
        notes.warn(f"{prefix}Descriptor: says {bits} bits, but the entries have 8")
        return plain, 8
    if words.max() >= 2**bits:
        most = 16 if _is_palette(prefix) else int(words.max()).bit_length()
        notes.warn(f"{prefix}Descriptor: says {bits} bits, but entries reach {words.max()}; {most} are taken")
        return words, most
    return words, bits


def _expanded(values: Values, prefix: str, bits: int, notes: Notes) -> NDArray[np.uint16]:
    """The entries of a segmented table (C.7.9.2); those up to where it is damaged."""
    keyword = f"Segmented{prefix}Data"
    found: list[int] = []
    if not _is_palette(prefix):
        return np.array(found, np.uint16)
    data = values.data(keyword, 8 if bits == 8 else 16).astype(np.int64)
    if data.size and not _expand(data, 0, None, 8 if bits == 8 else 16, found):
        notes.warn(f"{keyword} is damaged after {len(found)} entries")
    return np.array(found, np.uint16)


def _is_palette(prefix: str) -> bool:
    return prefix.endswith("PaletteColorLookupTable")


def _expand(data: NDArray[np.int64], start: int, segments: int | None, bits: int, found: list[int]) -> bool:
    """Appends the entries of segments from `start` on, all or so many; False where the data are damaged."""
    place, read = start, 0
    while place + 1 < len(data) and read != segments and len(found) <= _MOST:
        kind, length = int(data[place]), int(data[place + 1])
        place, read = place + 2, read + 1
        if kind == _DISCRETE and place + length <= len(data):
            found += data[place : place + length].tolist()
            place += length
        elif kind == _LINEAR and place < len(data) and found:
            last = int(data[place])  # the entry before is the start, which is not repeated
            steps = np.arange(1, length + 1) / max(length, 1)
            found += np.rint(found[-1] + (last - found[-1]) * steps).astype(int).tolist()
            place += 1
        elif kind == _INDIRECT and segments is None and place + 32 // bits <= len(data):
            offset = sum(int(part) << (bits * i) for i, part in enumerate(data[place : place + 32 // bits]))  # of bytes
            if not _expand(data, offset * 8 // bits, length, bits, found):
                return False
            place += 32 // bits
        else:
            return kind == 0 and length == 0
    return segments is None or read == segments


def apply_palette(stored: NDArray[np.integer], values: Values, notes: Notes) -> NDArray[np.uint8] | None:
    """Indexes ``[H, W]`` -> RGB ``[H, W, 3]``, the upper 8 bits of its entries; None without a palette."""
    signed = stored.dtype.kind == "i"
    names = [f"{colour}PaletteColorLookupTable" for colour in ("Red", "Green", "Blue")]
    tables = [read_table(values, name, notes, signed) for name in names]
    if any(table is None for table in tables):
        return None
    found = [table for table in tables if table is not None]
    shifts = [table.bits - 8 for table in found]
    if min(shifts) > 0 and 0 < max(int(table.entries.max()) for table in found) < 256:
        notes.warn("the palette says 16 bits, but no entry has more than 8; they are taken for 8, not for black")
        shifts = [0, 0, 0]
    return np.stack(
        [(table.look_up(stored) >> shift).astype(np.uint8) for table, shift in zip(found, shifts, strict=True)], axis=-1
    )
