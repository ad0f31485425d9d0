"""Readers and resizing."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageOps

from msformer.io.base import ImageError
from msformer.io.files import find_images, plain_name
from msformer.io.prepare import prepare_image, resize_image, resize_labels
from msformer.io.read import Reading, is_ct, read_image

COLOUR = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3) * 4
GREY = COLOUR[..., 0]


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".tiff", ".PNG"])
@pytest.mark.parametrize("pixels", [COLOUR, GREY], ids=["colour", "grey"])
def test_lossless_8_bit(pixels: NDArray[np.uint8], suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"name with space ü{suffix}"
    PILImage.fromarray(pixels).save(path)
    assert np.array_equal(read_image(path), pixels)


def test_jpeg_and_its_orientation(tmp_path: Path) -> None:
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:, :16] = 255
    exif = PILImage.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    PILImage.fromarray(pixels).save(tmp_path / "a.jpg", quality=95, exif=exif)
    found = read_image(tmp_path / "a.jpg")
    assert found.shape == (32, 16, 3)
    assert found[:12].mean() > 250
    assert found[20:].mean() < 5


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.float32, np.uint8])
@pytest.mark.parametrize("channels", [(), (3,)], ids=["grey", "colour"])
@pytest.mark.parametrize("compression", [None, "lzw", "deflate"])
def test_tiff(dtype: type, channels: tuple[int, ...], compression: str | None, tmp_path: Path) -> None:
    pixels = (
        np.arange(5 * 4 * (channels or (1,))[0]).reshape(5, 4, *channels) * 3 - (20 if dtype == np.int16 else 0)
    ).astype(dtype)
    tifffile.imwrite(
        tmp_path / "a.tif", pixels, compression=compression, photometric="rgb" if channels else "minisblack"
    )
    assert np.array_equal(read_image(tmp_path / "a.tif"), pixels)
    planar = np.moveaxis(pixels, -1, 0) if channels else pixels
    if channels:
        tifffile.imwrite(tmp_path / "b.tif", planar, photometric="rgb", planarconfig="separate")
        assert np.array_equal(read_image(tmp_path / "b.tif"), pixels)


@pytest.mark.parametrize("channels", [(), (3,), (4,)], ids=["grey", "colour", "alpha"])
def test_16_bit_png_keeps_its_bits(channels: tuple[int, ...], tmp_path: Path) -> None:
    pixels = np.arange(5 * 4 * (channels or (1,))[0], dtype=np.uint16).reshape(5, 4, *channels) * 257 + 3
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(pixels))
    assert np.array_equal(read_image(tmp_path / "a.png"), pixels[..., :3] if channels else pixels)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1", "CMYK"])
def test_other_modes(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    PILImage.fromarray(COLOUR).convert(mode).save(path)
    found = read_image(path)
    assert found.dtype == np.uint8
    assert found.shape == ((5, 4) if mode in ("LA", "1") else (5, 4, 3))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
def test_inverted_grey_tiff_is_turned_back(dtype: type[np.integer], tmp_path: Path) -> None:
    pixels = GREY.astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", ~pixels, photometric="miniswhite")
    assert np.array_equal(read_image(tmp_path / "a.tif"), pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_a_tiff(orientation: int, tmp_path: Path) -> None:
    tag = [(274, "H", 1, orientation, False)]
    tifffile.imwrite(tmp_path / "a.tif", COLOUR, photometric="rgb", extratags=tag)
    with PILImage.open(tmp_path / "a.tif") as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(read_image(tmp_path / "a.tif"), expected)


WRONG = [("PNG", ".tif"), ("TIFF", ".png"), ("BMP", ".jpg"), ("PNG", ".dcm"), ("TIFF", ".nii"), ("PNG", ".nii.gz")]


@pytest.mark.parametrize(("kind", "suffix"), WRONG)
def test_the_content_counts_not_the_suffix(kind: str, suffix: str, tmp_path: Path) -> None:
    PILImage.fromarray(COLOUR).save(tmp_path / f"a{suffix}", format=kind)
    assert np.array_equal(read_image(tmp_path / f"a{suffix}"), COLOUR)


def test_first_page_of_many(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.stack([GREY, GREY + 1, GREY + 2]), photometric="minisblack")
    with pytest.warns(UserWarning, match="the first of 3 pages"):
        assert np.array_equal(read_image(tmp_path / "a.tif"), GREY)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif"])
def test_not_an_image_truncated_or_empty(suffix: str, tmp_path: Path) -> None:
    whole = tmp_path / f"whole{suffix}"
    random = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    PILImage.fromarray(random).save(whole)
    contents = {"text": b"this is no image", "empty": b"", "truncated": whole.read_bytes()[: whole.stat().st_size // 2]}
    for name, content in contents.items():
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(content)
        with pytest.raises(ImageError, match=f"{name}{suffix}: (not an image|damaged)"):
            read_image(path)


def test_truncated_16_bit_png(tmp_path: Path) -> None:
    content = imagecodecs.png_encode(np.random.default_rng(0).integers(0, 65535, (64, 64, 3), dtype=np.uint16))
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageError, match=r"a\.png: damaged"):
        read_image(tmp_path / "a.png")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        read_image(tmp_path / "gone.png")


def test_dicom_files_named_by_uid(tmp_path: Path) -> None:
    names = ("1.2.840.113619.101", "1.2.840.113619.102", "IM0001")
    for name in names:
        (tmp_path / name).write_bytes(bytes(128) + b"DICM")
    (tmp_path / "1.2.3").write_bytes(b"something else")
    found = find_images([tmp_path])
    assert [path.name for path in found] == sorted(names)
    assert [plain_name(path) for path in found] == sorted(names), "none is cut, or two would share a name"
    assert plain_name(Path("v.1.NII.gz")) == "v.1"


def test_find_images_in_files_and_folders(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "sub/c.tif", "sub/notes.txt", ".hidden/d.png", "out/e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_images([tmp_path / "b.png", tmp_path], exclude=[tmp_path / "out"])
    assert [str(p.relative_to(tmp_path)) for p in found] == ["b.png", "a.JPG", "sub/c.tif"]
    with pytest.raises(FileNotFoundError, match="gone: no such file or folder"):
        find_images([tmp_path / "gone"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        find_images([tmp_path / "empty"])


def test_results_beside_or_above_the_images(tmp_path: Path) -> None:
    """Only what lies below a given folder is left out; into the folder itself results cannot go."""
    image = tmp_path / "sub" / "a.png"
    image.parent.mkdir()
    image.touch()
    assert find_images([image], exclude=[tmp_path / "sub"]) == [image]
    assert find_images([tmp_path / "sub"], exclude=[tmp_path]) == [image]
    with pytest.raises(ValueError, match=r"results cannot go into the folder that the images are in"):
        find_images([tmp_path / "sub" / ".." / "sub"], exclude=[tmp_path / "sub"])


def test_links_to_one_image_are_several_images(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "SHA256-abc").touch()
    for name in ("a.png", "b.png"):
        (tmp_path / name).symlink_to(tmp_path / "store" / "SHA256-abc")
    assert [path.name for path in find_images([tmp_path, tmp_path / "." / "a.png"])] == ["a.png", "b.png"]


def test_the_index_of_a_cd_is_no_image(tmp_path: Path) -> None:
    for name in ("DICOMDIR", "IM0001"):
        (tmp_path / name).write_bytes(bytes(128) + b"DICM")
    assert [path.name for path in find_images([tmp_path])] == ["IM0001"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a user whom permissions bind")
def test_unreadable_folder(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0)
    with pytest.raises(PermissionError, match="closed: the folder cannot be read"):
        find_images([folder])


def test_unreadable_folder_by_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for root, whom permissions do not bind."""

    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(PermissionError, match="the folder cannot be read: Permission denied"):
        find_images([tmp_path])


def test_value_ranges() -> None:
    assert prepare_image(COLOUR).max() == pytest.approx(COLOUR.max() / 255)
    stretched = prepare_image(np.array([[100, 300]], dtype=np.int16))
    assert stretched.shape == (3, 1, 2)
    assert stretched[0].tolist() == [[0, 1]]
    assert not prepare_image(np.full((2, 2), 9.0)).any()
    assert prepare_image(np.array([[True, False]]))[0].tolist() == [[1, 0]]
    assert prepare_image(GREY).shape == (3, 5, 4)


def test_resizing() -> None:
    image = torch.rand(3, 8, 8)
    assert torch.equal(resize_image(image, (8, 8)), image)
    halved = resize_image(torch.ones(3, 1, 1) * torch.tensor([0.0, 1.0]).repeat(8)[None, None], (1, 4))
    torch.testing.assert_close(halved[..., 1:3], torch.full((3, 1, 2), 0.5), rtol=0, atol=0.02)
    labels = np.arange(4).reshape(2, 2)
    assert resize_labels(labels, (4, 4)).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    assert resize_labels(np.arange(9).reshape(3, 3), (1, 1)).tolist() == [[4]]


def test_a_tiff_of_hounsfield_units_is_shown_in_the_window_of_ct(tmp_path: Path) -> None:
    values = np.array([[-1000, -512, 0, 512, 1500]], dtype=np.int16)
    path = tmp_path / "ct.tif"
    tifffile.imwrite(path, values)
    assert np.array_equal(read_image(path), [[0, 0, 128, 255, 255]])
    assert np.array_equal(read_image(path, Reading((-1000, 1500))), [[0, 50, 102, 154, 255]])
    assert is_ct(path)
    tifffile.imwrite(path, values // 10)
    assert np.array_equal(read_image(path), values // 10), "no value is as low as that of air"
    assert not is_ct(path)


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (1, 7, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_a_tiff_one_pixel_wide(shape: tuple[int, ...], dtype: type, tmp_path: Path) -> None:
    pixels = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    path = tmp_path / "line.tif"
    tifffile.imwrite(path, pixels, photometric="rgb" if pixels.ndim == 3 else "minisblack")
    assert np.array_equal(read_image(path), pixels)


def test_floating_point_values_are_not_taken_for_hounsfield_units(tmp_path: Path) -> None:
    path = tmp_path / "phase.tif"
    tifffile.imwrite(path, np.array([[-5000.0, 0.0, 5000.0]], dtype=np.float32))
    assert np.array_equal(read_image(path), [[-5000, 0, 5000]])
    assert not is_ct(path)


@pytest.mark.parametrize("inverted", [False, True])
def test_a_tiff_of_four_bits_a_pixel(inverted: bool, tmp_path: Path) -> None:
    """Written by hand: two pixels a byte."""
    tags = [(256, 4, 4), (257, 4, 1), (258, 3, 4), (259, 3, 1), (262, 3, 0 if inverted else 1)]
    tags += [(273, 4, 8), (277, 3, 1), (278, 4, 1), (279, 4, 2)]
    content = b"II*\0" + struct.pack("<I", 10) + bytes([0x0F, 0x5A]) + struct.pack("<H", len(tags))
    content += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags) + bytes(4)
    path = tmp_path / "a.tif"
    path.write_bytes(content)
    expected = np.array([[0, 255, 85, 170]])
    assert np.array_equal(read_image(path), 255 - expected if inverted else expected)
