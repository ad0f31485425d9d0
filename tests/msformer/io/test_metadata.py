"""Damage to what stands beside the pixels, and to the pixels."""

from __future__ import annotations

import io
import struct
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image as PILImage

from msformer.io.base import ImageError
from msformer.io.ordinary import read_raster
from msformer.io.prepare import prepare_image
from msformer.io.read import read_image
from msformer.pictures import indexed_png, read_labels

RANDOM = np.random.default_rng(0)
COLOUR = RANDOM.integers(0, 256, (24, 32, 3)).astype(np.uint8)
TURNED = PILImage.Exif()
TURNED[0x0112] = 6


def encoded(kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    PILImage.fromarray(COLOUR).save(content, kind, **options)
    return content.getvalue()


def read(content: bytes, path: Path) -> NDArray[Any]:
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_image(path)


def chunk(kind: bytes, content: bytes, check: int | None = None) -> bytes:
    check = zlib.crc32(kind + content) if check is None else check
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


BOMB = zlib.compress(bytes(3_000_000))


@pytest.mark.parametrize(
    "inserted",
    [
        chunk(b"tEXt", b"a\0b", check=1),
        chunk(b"zTXt", b"a\0\0" + BOMB),
        chunk(b"iCCP", b""),
        chunk(b"iCCP", b"a\0\0zzz"),
        chunk(b"pHYs", b"12"),
        chunk(b"gAMA", b""),
        chunk(b"gAMA", struct.pack(">I", 45455)),
        chunk(b"cHRM", b"1"),
        chunk(b"sRGB", b""),
        chunk(b"tRNS", b"1"),
        chunk(b"acTL", b"1"),
        chunk(b"fcTL", b"1"),
        chunk(b"eXIf", b"zzzz"),
        chunk(b"eXIf", b"\0\x08\0\x02\x01\x12\0\x03"),
    ],
    ids=lambda inserted: f"{inserted[4:8].decode()}-{len(inserted)}",
)
@pytest.mark.parametrize("deep", [False, True], ids=["8 bits", "16 bits"])
def test_chunks_of_a_png(inserted: bytes, deep: bool, tmp_path: Path) -> None:
    pixels = COLOUR.astype(np.uint16) * 257 if deep else COLOUR
    content = imagecodecs.png_encode(pixels)
    assert np.array_equal(read(content[:33] + inserted + content[33:], tmp_path / "a.png"), pixels)


def test_a_png_without_its_end(tmp_path: Path) -> None:
    content = encoded("PNG")
    assert np.array_equal(read(content[:-12], tmp_path / "a.png"), COLOUR)
    with pytest.raises(ImageError, match=r"a\.png: (damaged|not an image)"):
        read(content[:-30], tmp_path / "a.png")


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


@pytest.mark.parametrize(
    "inserted",
    [
        segment(0xE1, b"Exif\0\0zzzzzzzz"),
        segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\xff"),
        segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='zz'"),
        segment(0xE2, b"ICC_PROFILE\0"),
        segment(0xE2, b"MPF\0II*\0\x08\0\0\0\x01\0\x00\xb0\x07\0\xff\xff\xff\xff\0\0\0\0"),
        segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x04\x04\0\0\xff\xff\xff\xff"),
        segment(0xEE, b"Adobe"),
        segment(0xE0, b"JFIF\0"),
        b"\xff\xe5\xff\xff",
    ],
    ids=["EXIF", "short EXIF", "XMP", "ICC", "MPF", "Photoshop", "Adobe", "JFIF", "a length beyond the file"],
)
def test_segments_of_a_jpeg(inserted: bytes, tmp_path: Path) -> None:
    content = encoded("JPEG")
    expected = read(content, tmp_path / "a.jpg")
    assert np.array_equal(read(content[:2] + inserted + content[2:], tmp_path / "b.jpg"), expected)


@pytest.mark.parametrize("lossless", [False, True])
def test_chunks_of_a_webp(lossless: bool, tmp_path: Path) -> None:
    whole = encoded("WEBP", lossless=lossless, exif=TURNED)
    expected = read(whole, tmp_path / "a.webp")
    assert np.array_equal(read(whole[:-2], tmp_path / "b.webp"), expected), "turned, as far as the EXIF is there"
    assert read_raster(tmp_path / "a.webp").lossy != lossless
    with pytest.raises(ImageError, match="damaged"):
        read(whole[: len(whole) // 2], tmp_path / "c.webp")


def test_the_orientation_outlives_other_damage(tmp_path: Path) -> None:
    png, jpeg = encoded("PNG", exif=TURNED), encoded("JPEG", exif=TURNED)
    upright = np.rot90(COLOUR, -1)
    assert np.array_equal(read(png[:33] + chunk(b"pHYs", b"1") + png[33:], tmp_path / "a.png"), upright)
    assert read(jpeg[:2] + segment(0xE2, b"ICC_PROFILE\0") + jpeg[2:], tmp_path / "a.jpg").shape == upright.shape
    deep = imagecodecs.png_encode(COLOUR.astype(np.uint16) * 257)
    exif = chunk(b"eXIf", TURNED.tobytes().removeprefix(b"Exif\0\0"))
    assert np.array_equal(read(deep[:33] + exif + deep[33:], tmp_path / "b.png"), upright.astype(np.uint16) * 257)
    jpeg = imagecodecs.jpeg_encode(COLOUR.astype(np.uint16) * 16, bitspersample=12)
    stored = read(jpeg, tmp_path / "b.jpg")
    turned = read(jpeg[:2] + segment(0xE1, TURNED.tobytes()) + jpeg[2:], tmp_path / "c.jpg")
    assert np.array_equal(turned, np.rot90(stored, -1))


@pytest.mark.parametrize("value", [0, 9, (1, 2)])
def test_orientations_that_there_are_not(value: Any, tmp_path: Path) -> None:
    exif = PILImage.Exif()
    exif[0x0112] = value
    assert np.array_equal(read(encoded("PNG", exif=exif), tmp_path / "a.png"), COLOUR)
    image = PILImage.open(tmp_path / "a.png")
    assert prepare_image(image).shape == (3, *COLOUR.shape[:2]), "and in memory"


@pytest.mark.parametrize("exif", [b"\0\x08\0\x02\x01\x12\0\x03", b"MM\0*\0\0\0\x08\0\x01"], ids=["order", "truncated"])
@pytest.mark.parametrize("kind", ["png", "png16", "jpg", "jpg12"])
def test_damaged_exif_gives_a_warning(kind: str, exif: bytes, tmp_path: Path) -> None:
    deep = COLOUR.astype(np.uint16)
    content = {
        "png": lambda: encoded("PNG"),
        "png16": lambda: imagecodecs.png_encode(deep * 257),
        "jpg": lambda: encoded("JPEG"),
        "jpg12": lambda: imagecodecs.jpeg_encode(deep * 16, bitspersample=12),
    }[kind]()
    start, damage = (33, chunk(b"eXIf", exif)) if "png" in kind else (2, segment(0xE1, b"Exif\0\0" + exif))
    path = tmp_path / f"a.{kind[:3]}"
    path.write_bytes(content[:start] + damage + content[start:])
    with pytest.warns(UserWarning, match=r"a\....: the EXIF is damaged"):
        assert read_image(path).shape == COLOUR.shape


@pytest.mark.parametrize("code", [305, 270, 34675, 700, 33550], ids=str)
def test_tags_of_a_tiff_that_lead_nowhere(code: int, tmp_path: Path) -> None:
    content = io.BytesIO()
    tag = (code, "d", 3, (1.0, 1.0, 1.0), False) if code == 33550 else (code, "s", 0, "x" * 40, False)
    tifffile.imwrite(content, COLOUR, photometric="rgb", metadata=None, software=False, extratags=[tag])
    data = bytearray(content.getvalue())
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        at = tiff.pages[0].tags[code].offset
    data[at + 8 : at + 12] = struct.pack("<I", 2**31)
    assert np.array_equal(read(bytes(data), tmp_path / "a.tif"), COLOUR)


@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "jpeg", "zstd", "webp"])
@pytest.mark.parametrize("tile", [None, (16, 16)], ids=["strips", "tiles"])
def test_truncated_tiff(compression: str | None, tile: tuple[int, int] | None, tmp_path: Path) -> None:
    content = io.BytesIO()
    tifffile.imwrite(content, COLOUR, photometric="rgb", compression=compression, tile=tile, rowsperstrip=8)
    with pytest.raises(ImageError, match=r"a\.tif: damaged"):
        read(content.getvalue()[: int(len(content.getvalue()) * 0.7)], tmp_path / "a.tif")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000", "PPM"])
def test_pictures_that_pillow_takes_for_bombs(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its limit is for websites; what is read and written here is larger."""
    content = encoded(kind)
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 10)
    assert read(content, tmp_path / "a").shape[:2] == COLOUR.shape[:2]
    assert PILImage.MAX_IMAGE_PIXELS == 10, "others keep it"
    labels = np.arange(24 * 32).reshape(24, 32) % 5
    indexed_png(labels).save(tmp_path / "labels.png")
    assert np.array_equal(read_labels(tmp_path / "labels.png"), labels)


def test_more_pixels_than_are_read(tmp_path: Path) -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2**16, 2**15, 8, 0, 0, 0, 0))
    content = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(ImageError, match=r"a\.png: has 65536 x 32768 pixels; at most 2\^30 are read"):
        read(content, tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_of_an_animation(kind: str, tmp_path: Path) -> None:
    frames = [PILImage.fromarray(np.full((8, 9), value, np.uint8)) for value in (10, 200)]
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(tmp_path / "a", kind, save_all=True, append_images=frames[1:], **options)
    with pytest.warns(UserWarning, match="the first of 2 pictures is read"):
        assert (read_image(tmp_path / "a") == 10).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_transparency(mode: str, tmp_path: Path) -> None:
    channel = np.array([[0, 255, 130]], dtype=np.uint8)
    if mode in ("RGBA", "LA"):
        image = PILImage.new(mode, (3, 1), 255 if mode == "LA" else "white")
        image.putalpha(PILImage.fromarray(channel))
        image.save(tmp_path / "a.png")
    else:
        PILImage.fromarray(channel).convert(mode).save(tmp_path / "a.png", transparency=0)
        channel = np.where(channel == 0, 0, 255).astype(np.uint8)
    found = read_raster(tmp_path / "a.png").alpha
    assert found is not None
    assert np.array_equal(found, channel)
    PILImage.fromarray(COLOUR).save(tmp_path / "b.png")
    assert read_raster(tmp_path / "b.png").alpha is None


def test_jpeg_of_cmyk_and_of_12_bits(tmp_path: Path) -> None:
    inks = np.full((8, 8, 4), (0, 128, 255, 40), np.uint8)
    PILImage.fromarray(inks, "CMYK").save(tmp_path / "a.jpg", quality=100, subsampling=0)
    expected = np.asarray(PILImage.fromarray(inks, "CMYK").convert("RGB"))
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - expected).max() <= 3
    deep = np.add.outer(np.arange(0, 4000, 125), np.arange(64)).astype(np.uint16)
    content = imagecodecs.jpeg_encode(deep, bitspersample=12, level=98)
    assert np.abs(read(content, tmp_path / "b.jpg").astype(int) - deep).max() < 40
    with pytest.raises(ImageError, match="truncated"):
        read(content[:-20], tmp_path / "b.jpg")
    size = content.index(b"\xff\xc1") + 5
    with pytest.raises(ImageError, match="65000 x 65000 pixels; at most"):
        read(content[:size] + struct.pack(">HH", 65000, 65000) + content[size + 4 :], tmp_path / "b.jpg")


def test_heic(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    smooth = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (48, 64, 3))
    heif.from_pillow(PILImage.fromarray(smooth)).save(tmp_path / "a.heic", quality=95)
    (tmp_path / "a.heic").rename(tmp_path / "a.jpg")
    raster = read_raster(tmp_path / "a.jpg")
    assert np.abs(raster.pixels.astype(int) - smooth).max() <= 6
    assert raster.lossy


def test_heic_without_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with pytest.raises(ImageError, match=r"pillow-heif is not installed; run: pip install 'msformer\[heif\]'"):
        read_image(tmp_path / "a.heic")


def test_no_program_is_run_for_a_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n%%EOF\n")
    with pytest.raises(ImageError, match="not an image that can be read"):
        read_image(tmp_path / "a.png")
