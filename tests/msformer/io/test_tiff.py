"""TIFF: which picture of a file is read, and its colours."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageCms

from msformer.io.base import ImageError
from msformer.io.ordinary import from_pillow, read_raster
from msformer.io.read import read_image

RANDOM = np.random.default_rng(0)
COLOUR = RANDOM.integers(0, 256, (24, 32, 3)).astype(np.uint8)
GREY16 = RANDOM.integers(0, 4096, (24, 32)).astype(np.uint16)


def quiet(path: Path) -> NDArray[Any]:
    """What is read without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read_image(path)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_a_thumbnail_is_passed_over(last: bool, tmp_path: Path) -> None:
    pages = [(COLOUR, 0), (COLOUR[::4, ::4], 1)]
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for pixels, kind in pages if last else pages[::-1]:
            writer.write(pixels, photometric="rgb", subfiletype=kind)
    assert np.array_equal(quiet(tmp_path / "a.tif"), COLOUR)


def test_a_thumbnail_that_the_file_does_not_mark(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(COLOUR[::4, ::4], photometric="rgb")
        writer.write(COLOUR, photometric="rgb")
    with pytest.warns(UserWarning, match=r"a\.tif: page 2 of 2, the largest, is read"):
        assert np.array_equal(read_image(tmp_path / "a.tif"), COLOUR)


def test_a_thumbnail_of_old_files(tmp_path: Path) -> None:
    """SubfileType, not NewSubfileType."""
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for pixels, kind in ((COLOUR[::2, ::2], 2), (COLOUR, 1)):
            writer.write(pixels, photometric="rgb", extratags=[(255, "H", 1, kind, False)])
    assert np.array_equal(read_image(tmp_path / "a.tif"), COLOUR)


@pytest.mark.parametrize("full", [True, False], ids=["levels below", "picture below"])
def test_subifds(full: bool, tmp_path: Path) -> None:
    """A pyramid has its levels in SubIFDs, cameras have the picture there and a thumbnail before it."""
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        above, below = (COLOUR, COLOUR[::2, ::2]) if full else (COLOUR[::2, ::2], COLOUR)
        writer.write(above, photometric="rgb", subifds=1, subfiletype=0 if full else 1)
        writer.write(below, photometric="rgb", subfiletype=1 if full else 0)
    assert np.array_equal(quiet(tmp_path / "a.tif"), COLOUR)


def test_a_transparency_mask_is_no_picture(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(np.ones((48, 64), np.bool_), photometric="mask", subfiletype=4)
        writer.write(COLOUR, photometric="rgb")
    assert np.array_equal(quiet(tmp_path / "a.tif"), COLOUR)


def test_a_pyramid_of_ome(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as writer:
        writer.write(COLOUR, photometric="rgb", subifds=2, metadata={"axes": "YXS"}, tile=(16, 16))
        for step in (2, 4):
            writer.write(COLOUR[::step, ::step], photometric="rgb", subfiletype=1, tile=(16, 16))
    assert np.array_equal(quiet(path), COLOUR)


STACK = RANDOM.integers(0, 4096, (2, 3, 4, 6, 7)).astype(np.uint16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"imagej": True, "metadata": {"axes": "TZCYX"}}, "the first of 24 pages is read"),
        ({"imagej": True, "truncate": True, "metadata": {"axes": "TZCYX"}}, "the first of 24 planes is read"),
        ({"ome": True, "metadata": {"axes": "TZCYX"}}, "the first of 24 pages is read"),
        ({"photometric": "minisblack"}, "the first of 24 pages is read"),
        ({"photometric": "minisblack", "volumetric": True}, "the first of 6 pages is read"),
    ],
    ids=["ImageJ", "ImageJ in one page", "OME", "plain", "depth"],
)
def test_the_first_picture_of_a_stack(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", STACK, **options)
    with pytest.warns(UserWarning, match=message):
        assert np.array_equal(read_image(tmp_path / "a.tif"), STACK[0, 0, 0])


def test_a_volume_in_one_page(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", STACK[0, 0], photometric="minisblack", volumetric=True)
    with pytest.warns(UserWarning, match="the first of 4 planes is read"):
        assert np.array_equal(read_image(tmp_path / "a.tif"), STACK[0, 0, 0])


def test_channels_that_are_no_colours(tmp_path: Path) -> None:
    many = RANDOM.integers(0, 256, (8, 9, 6)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", many, photometric="minisblack", planarconfig="contig")
    with pytest.warns(UserWarning, match="the first of 6 channels"):
        assert np.array_equal(read_image(tmp_path / "a.tif"), many[..., 0])
    tifffile.imwrite(tmp_path / "b.tif", many, photometric="rgb", extrasamples=["unspecified"] * 3)
    assert np.array_equal(quiet(tmp_path / "b.tif"), many[..., :3])


def test_a_damaged_second_page_does_not_hide_the_first(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.stack([GREY16, GREY16]), photometric="minisblack", metadata=None)
    content = bytearray((tmp_path / "a.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        second = tiff.pages[1].offset
    content[second : second + 2] = b"\xff\xff"
    (tmp_path / "a.tif").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.array_equal(read_image(tmp_path / "a.tif"), GREY16)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_palettes(bits: int, tmp_path: Path) -> None:
    colours = RANDOM.integers(0, 256, (2**bits, 3)).astype(np.uint16)
    colours[0] = 255
    indexes = RANDOM.integers(0, 2**bits, (8, 16)).astype(np.uint16 if bits == 16 else np.uint8)
    path = write_palette(tmp_path / "a.tif", indexes, colours * 257, bits)
    assert np.array_equal(quiet(path), colours[indexes])
    found = read_raster(path).indexes
    assert found is not None
    assert np.array_equal(found, indexes)
    if bits <= 8:
        with PILImage.open(path) as image:
            assert np.array_equal(np.asarray(image.convert("RGB")), colours[indexes])


def write_palette(path: Path, indexes: NDArray[Any], colours: NDArray[np.uint16], bits: int) -> Path:
    """By hand, since no library writes palettes of 16 bits; rows are whole bytes."""
    packed = np.unpackbits(indexes[..., None], axis=-1)[..., -bits:] if bits < 8 else None
    pixels = indexes.astype(f"<u{max(bits // 8, 1)}").tobytes() if packed is None else np.packbits(packed).tobytes()
    table = colours.T.astype("<u2").tobytes()
    height, width = indexes.shape
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, bits), (259, 3, 1, 1), (262, 3, 1, 3)]
    tags += [(273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, len(pixels))]
    tags += [(320, 3, 3 * 2**bits, 8 + len(pixels))]
    content = b"II*\0" + struct.pack("<I", 8 + len(pixels) + len(table)) + pixels + table + struct.pack("<H", len(tags))
    path.write_bytes(content + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4))
    return path


def test_a_palette_of_8_bits_in_16(tmp_path: Path) -> None:
    colours = np.arange(768, dtype=np.uint16).reshape(256, 3) % 256
    indexes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    path = write_palette(tmp_path / "a.tif", indexes, colours, 8)
    with pytest.warns(UserWarning, match="the palette of 16 bits has values of 8 bits"):
        assert np.array_equal(read_image(path), colours[indexes])


SMOOTH = np.stack(np.meshgrid(np.linspace(30, 220, 32), np.linspace(60, 200, 24)), -1).round().astype(np.uint8)
SMOOTH = np.concatenate([SMOOTH, 255 - SMOOTH[..., :1]], axis=-1)


def test_cielab_as_littlecms_converts_it(tmp_path: Path) -> None:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(PILImage.fromarray(SMOOTH), *profiles, outputMode="LAB")
    assert lab is not None
    lab.save(tmp_path / "a.tif")
    assert np.abs(quiet(tmp_path / "a.tif").astype(int) - SMOOTH).mean() < 2
    assert np.array_equal(from_pillow(lab), quiet(tmp_path / "a.tif")), "the same in memory"
    stored = np.asarray(lab)  # a* and b* as signed bytes, as in TIFF
    chroma = stored[..., 1:].view(np.int8).astype(np.int16) * 256
    deep = np.concatenate([stored[..., :1] * np.uint16(257), chroma.view(np.uint16)], axis=-1)
    tifffile.imwrite(tmp_path / "b.tif", deep, photometric="cielab")
    assert np.array_equal(quiet(tmp_path / "b.tif"), quiet(tmp_path / "a.tif"))
    tifffile.imwrite(tmp_path / "c.tif", stored ^ np.array([0, 128, 128], np.uint8), photometric="icclab")
    assert np.array_equal(quiet(tmp_path / "c.tif"), quiet(tmp_path / "a.tif"))


@pytest.mark.parametrize("bits", [8, 16])
def test_cmyk(bits: int, tmp_path: Path) -> None:
    inks = RANDOM.integers(0, 256, (8, 9, 4)).astype(np.uint8)
    stored = inks if bits == 8 else inks.astype(np.uint16) * 257
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="separated")
    assert np.array_equal(quiet(tmp_path / "a.tif"), np.asarray(PILImage.fromarray(inks, "CMYK").convert("RGB")))


def test_ycbcr_with_and_without_jpeg(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", SMOOTH, photometric="rgb", compression="jpeg", compressionargs={"level": 95})
    raster = read_raster(tmp_path / "a.tif")
    assert np.abs(raster.pixels.astype(int) - SMOOTH).max() < 12
    assert raster.lossy
    content = io.BytesIO()
    PILImage.fromarray(SMOOTH).convert("YCbCr").save(content, "TIFF")
    (tmp_path / "b.tif").write_bytes(content.getvalue())
    assert np.abs(quiet(tmp_path / "b.tif").astype(int) - SMOOTH).max() <= 3


def test_what_libtiff_decodes_is_whole(tmp_path: Path) -> None:
    """It would fill up with black."""
    PILImage.fromarray(SMOOTH).convert("YCbCr").save(tmp_path / "a.tif")
    content = (tmp_path / "a.tif").read_bytes()
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        start = tiff.pages[0].dataoffsets[0]
    assert start > 100, "the pixels stand behind the tags"
    (tmp_path / "a.tif").write_bytes(content[: start + 500])
    with pytest.raises(ImageError, match="truncated"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_libtiff_and_orientation(orientation: int, tmp_path: Path) -> None:
    image = PILImage.fromarray(SMOOTH).convert("YCbCr")
    image.save(tmp_path / "a.tif", tiffinfo={274: orientation})
    tifffile.imwrite(tmp_path / "b.tif", SMOOTH, photometric="rgb", extratags=[(274, "H", 1, orientation, False)])
    found, expected = quiet(tmp_path / "a.tif"), quiet(tmp_path / "b.tif")
    assert np.abs(found.astype(int) - expected).max() <= 3


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("tile", [None, (16, 16)], ids=["strips", "tiles"])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_tiles_planes_and_byte_order(
    dtype: type, tile: tuple[int, int] | None, planar: bool, order: str, tmp_path: Path
) -> None:
    pixels = (COLOUR.astype(np.uint16) * (1 if dtype == np.uint8 else 257)).astype(dtype)
    stored = np.moveaxis(pixels, -1, 0) if planar else pixels
    kind = "separate" if planar else "contig"
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, stored, photometric="rgb", planarconfig=kind, tile=tile, byteorder=order, bigtiff=planar)
    assert np.array_equal(quiet(path), pixels)


@pytest.mark.parametrize("bits", [1, 4, 12])
@pytest.mark.parametrize("inverted", [False, True])
def test_bits_a_sample(bits: int, inverted: bool, tmp_path: Path) -> None:
    white = 2**bits - 1
    pixels = RANDOM.integers(0, white + 1, (6, 16)).astype(np.uint16 if bits > 8 else np.uint8)
    stored = white - pixels if inverted else pixels
    content = np.packbits(stored) if bits == 1 else imagecodecs.packints_encode(stored, bits)
    kind = "miniswhite" if inverted else "minisblack"
    path = write_bits(tmp_path / "a.tif", bytes(content), pixels.shape, bits, kind)
    expected = pixels if bits > 8 else (pixels * (255 // white)).astype(np.uint8)
    assert np.array_equal(quiet(path), expected)


def write_bits(path: Path, content: bytes, shape: tuple[int, ...], bits: int, kind: str) -> Path:
    tags = [(256, 4, shape[1]), (257, 4, shape[0]), (258, 3, bits), (259, 3, 1), (262, 3, kind == "minisblack")]
    tags += [(273, 4, 8), (277, 3, 1), (278, 4, shape[0]), (279, 4, len(content))]
    head = b"II*\0" + struct.pack("<I", 8 + len(content)) + content + struct.pack("<H", len(tags))
    path.write_bytes(head + b"".join(struct.pack("<HHII", tag, code, 1, value) for tag, code, value in tags) + bytes(4))
    return path


def test_missing_values_are_dark(tmp_path: Path) -> None:
    values = RANDOM.normal(size=(8, 9)).astype(np.float32)
    values[0] = np.nan
    tifffile.imwrite(tmp_path / "a.tif", values)
    with pytest.warns(UserWarning, match="9 missing values"):
        found = read_image(tmp_path / "a.tif")
    assert (found[0] == np.nanmin(values)).all()
    assert np.array_equal(found[1:], values[1:])
    tifffile.imwrite(tmp_path / "b.tif", np.nan_to_num(values, nan=-9999), extratags=[(42113, "s", 0, "-9999", True)])
    with pytest.warns(UserWarning, match="9 missing values"):
        assert np.array_equal(read_image(tmp_path / "b.tif"), found)


def test_alpha_of_a_tiff(tmp_path: Path) -> None:
    rgba = np.concatenate([COLOUR, COLOUR[..., :1]], axis=-1)
    for dtype, name in ((np.uint8, "a"), (np.uint16, "b")):
        stored = rgba.astype(dtype) * dtype(257 if dtype == np.uint16 else 1)
        tifffile.imwrite(tmp_path / f"{name}.tif", stored, photometric="rgb", extrasamples=["unassalpha"])
        raster = read_raster(tmp_path / f"{name}.tif")
        assert raster.alpha is not None
        assert np.array_equal(raster.alpha, COLOUR[..., 0])
        assert np.array_equal(quiet(tmp_path / f"{name}.tif"), stored[..., :3])


def too_wide(page: bytearray) -> bytearray:
    """Of a file of tifffile, which writes the width as its second tag."""
    at = page.index(struct.pack("<HHI", 256, 4, 1))
    page[at + 8 : at + 12] = struct.pack("<I", 2**30)
    return page


def no_photometric(page: bytearray) -> bytearray:
    at = page.index(struct.pack("<HHI", 262, 3, 1))
    page[at : at + 2] = struct.pack("<H", 263)
    return page


@pytest.mark.parametrize(
    ("damage", "message"), [(too_wide, "at most 2\\^30 are read"), (lambda page: page[:6], "damaged or unsupported")]
)
def test_damaged(damage: Callable[[bytearray], bytearray], message: str, tmp_path: Path) -> None:
    content = io.BytesIO()
    tifffile.imwrite(content, COLOUR, photometric="rgb", metadata=None)
    (tmp_path / "a.tif").write_bytes(damage(bytearray(content.getvalue())))
    with pytest.raises(ImageError, match=message):
        read_image(tmp_path / "a.tif")


def test_without_a_word_about_colours(tmp_path: Path) -> None:
    content = io.BytesIO()
    tifffile.imwrite(content, COLOUR, photometric="rgb", metadata=None)
    (tmp_path / "a.tif").write_bytes(no_photometric(bytearray(content.getvalue())))
    assert np.array_equal(read_image(tmp_path / "a.tif"), COLOUR)


def test_the_values_of_a_sensor_are_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", GREY16, photometric="cfa")
    with pytest.raises(ImageError, match="colour filter array"):
        read_image(tmp_path / "a.tif")
