"""BMP with bit fields: what is read is right, the rest is refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from msformer.io.base import ImageError
from msformer.io.read import read_image


def bmp(masks: tuple[int, int, int], bits: int, values: NDArray[Any], header: int = 40) -> bytes:
    height, width = values.shape
    row = (width * bits + 31) // 32 * 4
    lines = [line.astype(f"<u{bits // 8}").tobytes().ljust(row, b"\0") for line in values[::-1]]
    size = row * height
    head = struct.pack("<IiiHHIIiiII", header, width, height, 1, bits, 3, size, 2835, 2835, 0, 0)
    head = (head + struct.pack("<3I", *masks)).ljust(max(header, 52), b"\0")
    return b"BM" + struct.pack("<IHHI", 14 + len(head) + size, 0, 0, 14 + len(head)) + head + b"".join(lines)


def expected(masks: tuple[int, int, int], values: NDArray[Any]) -> NDArray[Any]:
    """Each colour from 0 to its largest value, as 0 to 255."""
    return np.stack([(values & mask) / mask * 255 for mask in masks], axis=2)


@pytest.mark.parametrize("header", [40, 56, 124])
@pytest.mark.parametrize(
    ("masks", "bits"),
    [
        ((0xF00, 0xF0, 0xF), 16),
        ((0x1F, 0x7E0, 0xF800), 16),
        ((0xE000, 0x1F00, 0xFF), 16),
        ((0x4000, 0x38, 0x7), 16),
        ((0xFF, 0xFF00, 0xFF0000), 32),
        ((0xFF000000, 0xFF, 0xFF00), 32),
    ],
)
def test_colours_where_the_masks_say(masks: tuple[int, int, int], bits: int, header: int, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 2**bits, (5, 7), dtype=np.uint64)
    (tmp_path / "a.bmp").write_bytes(bmp(masks, bits, values, header))
    assert np.abs(read_image(tmp_path / "a.bmp") - expected(masks, values)).max() <= 1


@pytest.mark.parametrize(
    ("masks", "bits"),
    [
        ((0x3FF00000, 0xFFC00, 0x3FF), 32),
        ((0xFF0, 0xFF000, 0xFF00000), 32),
        ((0xF00, 0xFF0, 0xF), 16),
        ((0xF0F, 0xF0, 0xF000), 16),
        ((0xF00, 0xF0, 0), 16),
        ((0xF0000, 0xF0, 0xF), 16),
    ],
)
def test_what_no_decoder_here_gets_right_is_refused(masks: tuple[int, int, int], bits: int, tmp_path: Path) -> None:
    """Ten bits, colours across bytes, masks that overlap, have gaps, are empty or beyond the pixel."""
    (tmp_path / "a.bmp").write_bytes(bmp(masks, bits, np.zeros((5, 7), np.uint64)))
    with pytest.raises(ImageError, match=rf"a\.bmp: the bit fields {masks[0]:#x}, .* in pixels of {bits} bits are not"):
        read_image(tmp_path / "a.bmp")


def test_truncated(tmp_path: Path) -> None:
    (tmp_path / "a.bmp").write_bytes(bmp((0xF00, 0xF0, 0xF), 16, np.zeros((5, 7), np.uint64))[:-1])
    with pytest.raises(ImageError, match="truncated"):
        read_image(tmp_path / "a.bmp")
