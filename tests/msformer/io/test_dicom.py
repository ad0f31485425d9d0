"""DICOM: values, windows, colours, geometry, and files that cannot be read."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from msformer.io.base import ImageError, apply_window, default_window, show
from msformer.io.dicom import read_dicom
from msformer.io.medical import count_slices
from tests.msformer.io.world import COLOUR, GREY, NAME, UID, save_dicom

pydicom = pytest.importorskip("pydicom")


def test_hounsfield_units(tmp_path: Path) -> None:
    path = save_dicom(tmp_path / f"{NAME}.dcm", GREY, RescaleSlope=2, RescaleIntercept=-1024, Modality="CT")
    found = read_dicom(path)
    assert found.pixels.dtype == np.float32
    assert np.array_equal(found.pixels, GREY * 2.0 - 1024)
    assert found.modality == "CT"
    assert found.window is None
    assert default_window(found) == (-512, 512)
    assert count_slices(path) == 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
def test_monochrome1_is_shown_inverted(dtype: type[np.integer[Any]], tmp_path: Path) -> None:
    pixels = GREY.astype(dtype)
    tags: dict[str, Any] = {"RescaleSlope": 2, "RescaleIntercept": 5, "WindowCenter": 15, "WindowWidth": 10}
    plain = read_dicom(save_dicom(tmp_path / "plain", pixels, **tags))
    inverted = read_dicom(save_dicom(tmp_path / "inverted", pixels, "MONOCHROME1", **tags))
    assert np.array_equal(inverted.pixels, plain.pixels)
    assert inverted.window == plain.window == (10, 19)
    for window in (None, (12.0, 40.0)):
        assert np.array_equal(show(inverted, window), 255 - show(plain, window))


def test_monochrome1_in_the_window_of_ct(tmp_path: Path) -> None:
    """It is of Hounsfield units, whichever way they are shown."""
    pixels = np.array([[0, 1024, 1536, 4095]], np.uint16)
    tags: dict[str, Any] = {"Modality": "CT", "RescaleSlope": 1, "RescaleIntercept": -1024, "BitsStored": 12}
    found = read_dicom(save_dicom(tmp_path / "a.dcm", pixels, "MONOCHROME1", HighBit=11, **tags))
    assert np.array_equal(show(found), [[255, 127, 0, 0]])


@pytest.mark.parametrize(
    ("centre", "width", "expected"),
    [
        (40, 400, (-160, 239)),  # c - 0.5 - (w - 1) / 2 and c - 0.5 + (w - 1) / 2
        ([40.5, -600], [80, 1500], (0.5, 79.5)),
        (None, 400, None),
        (40, None, None),
        (40, 0, None),
    ],
)
def test_window_tags(centre: Any, width: Any, expected: Any, tmp_path: Path) -> None:
    tags = {"RescaleSlope": 1, "RescaleIntercept": 0, "WindowCenter": centre, "WindowWidth": width}
    found = read_dicom(save_dicom(tmp_path / "a.dcm", GREY, Modality="CT", **tags))
    assert found.window == expected
    assert default_window(found) == (expected or (-512, 512))


def test_rgb(tmp_path: Path) -> None:
    found = read_dicom(save_dicom(tmp_path / "a.dcm", COLOUR, "RGB"))
    assert found.pixels.dtype == np.uint8
    assert np.array_equal(found.pixels, COLOUR)
    assert np.array_equal(apply_window(found.pixels, *default_window(found)), COLOUR)
    planar = np.moveaxis(COLOUR, -1, 0).tobytes()
    path = save_dicom(tmp_path / "b.dcm", COLOUR, "RGB", PlanarConfiguration=1, PixelData=planar)
    assert np.array_equal(read_dicom(path).pixels, COLOUR)
    path = save_dicom(tmp_path / "c.dcm", COLOUR.astype(np.uint16) << 4, "RGB", BitsStored=12, HighBit=11)
    assert np.array_equal(read_dicom(path).pixels, COLOUR)


@pytest.mark.parametrize("compressed", [False, True])
def test_ybr_becomes_rgb(compressed: bool, tmp_path: Path) -> None:
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:, :, 0] = 200
    picture = PILImage.fromarray(pixels)
    if compressed:
        stream = io.BytesIO()
        picture.save(stream, format="JPEG", quality=95, subsampling=0)
        data = pydicom.encaps.encapsulate([stream.getvalue()])
        path = save_dicom(tmp_path / "a.dcm", pixels, "YBR_FULL", UID.JPEGBaseline8Bit, PixelData=data)
    else:
        path = save_dicom(tmp_path / "a.dcm", np.asarray(picture.convert("YCbCr")), "YBR_FULL")
    assert np.abs(read_dicom(path).pixels.astype(int) - pixels).max() <= 3


def test_palette(tmp_path: Path) -> None:
    table = np.arange(0, 60, 3, dtype=np.uint16) << 8
    tags: dict[str, Any] = {}
    for number, name in enumerate(("Red", "Green", "Blue")):
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [20, 0, 16]
        tags[f"{name}PaletteColorLookupTableData"] = (table + (number << 8)).tobytes()
    found = read_dicom(save_dicom(tmp_path / "a.dcm", GREY.astype(np.uint8), "PALETTE COLOR", **tags))
    assert found.pixels.dtype == np.uint8
    assert np.array_equal(found.pixels, COLOUR)


def test_run_length_encoding(tmp_path: Path) -> None:
    path = save_dicom(tmp_path / "a.dcm", GREY)
    dataset = pydicom.dcmread(path)
    dataset.compress(UID.RLELossless)
    dataset.save_as(path)
    assert np.array_equal(read_dicom(path).pixels, GREY)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_becomes_the_darkest_of_the_others(photometric: str, tmp_path: Path) -> None:
    pixels = GREY + 100
    pixels[0, :3] = -2000, -1999, -1990
    tags: dict[str, Any] = {"PixelPaddingValue": -2000, "RescaleSlope": 1, "RescaleIntercept": -10}
    one = read_dicom(save_dicom(tmp_path / "a.dcm", pixels, photometric, **tags)).pixels
    several = read_dicom(save_dicom(tmp_path / "b.dcm", pixels, photometric, PixelPaddingRangeLimit=-1990, **tags))
    darkest = np.max if photometric == "MONOCHROME1" else np.min
    assert one[0, 0] == darkest(one.reshape(-1)[1:])
    assert np.all(several.pixels[0, :3] == darkest(several.pixels.reshape(-1)[3:]))


def test_padding_of_the_wrong_sign_and_padding_alone(tmp_path: Path) -> None:
    pixels = GREY.copy()
    pixels[0, 0] = -2000
    path = save_dicom(tmp_path / "a.dcm", pixels)
    dataset = pydicom.dcmread(path)
    dataset.add_new("PixelPaddingValue", "US", 65536 - 2000)
    dataset.save_as(path)
    assert read_dicom(path).pixels[0, 0] == 1
    assert np.all(read_dicom(save_dicom(path, np.full_like(GREY, 7), PixelPaddingValue=7)).pixels == 7)


def test_missing_geometry(tmp_path: Path) -> None:
    geometry = read_dicom(save_dicom(tmp_path / "a.dcm", GREY)).geometry
    assert geometry is not None
    assert np.array_equal(geometry.affine, np.diag([-1, -1, 1, 1]))
    assert geometry.shape == (5, 4, 1)
    tags: dict[str, Any] = {"PixelSpacing": [2, 3], "SpacingBetweenSlices": 4, "ImageOrientationPatient": [0] * 6}
    geometry = read_dicom(save_dicom(tmp_path / "b.dcm", GREY, **tags)).geometry
    assert geometry is not None
    assert np.array_equal(geometry.affine, np.diag([-3, -2, 4, 1]))


def test_functional_groups_of_an_enhanced_object(tmp_path: Path) -> None:
    measures, values, group = (pydicom.Dataset() for _ in range(3))
    measures.PixelSpacing, measures.SliceThickness = [2, 3], 5
    values.RescaleSlope, values.RescaleIntercept = 1, -1000
    group.PixelMeasuresSequence, group.PixelValueTransformationSequence = [measures], [values]
    found = read_dicom(save_dicom(tmp_path / "a.dcm", GREY, NumberOfFrames=1, SharedFunctionalGroupsSequence=[group]))
    assert np.array_equal(found.pixels, GREY - 1000.0)
    assert found.geometry is not None
    assert np.array_equal(found.geometry.affine, np.diag([-3, -2, 5, 1]))


def test_transfer_syntax_that_cannot_be_decoded(tmp_path: Path) -> None:
    data = pydicom.encaps.encapsulate([b"no JPEG at all"])
    path = save_dicom(tmp_path / "a.dcm", GREY, syntax=UID.JPEGLosslessSV1, PixelData=data)
    with pytest.raises(ImageError, match=r"a\.dcm: the pixels \(transfer syntax JPEG Lossless.*\) cannot be decoded"):
        read_dicom(path)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_truncated_dicom(part: float, tmp_path: Path) -> None:
    path = save_dicom(tmp_path / "a.dcm", np.zeros((64, 64), dtype=np.uint16))
    content = path.read_bytes()
    path.write_bytes(content[: max(int(len(content) * part), 140)])
    with pytest.raises(ImageError, match=r"a\.dcm: "):
        read_dicom(path)


def test_not_dicom(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(b"this is no picture" * 10)
    with pytest.raises(ImageError, match=r"a\.dcm: not a DICOM file"):
        read_dicom(tmp_path / "a.dcm")
    with pytest.raises(FileNotFoundError, match=r"b\.dcm"):
        read_dicom(tmp_path / "b.dcm")
    path = save_dicom(tmp_path / "c.dcm", GREY)
    dataset = pydicom.dcmread(path)
    del dataset.PixelData
    dataset.save_as(path)
    with pytest.raises(ImageError, match=r"c\.dcm: holds no picture"):
        read_dicom(path)
