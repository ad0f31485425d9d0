"""What DICOM files from the field are like, beyond the well-formed ones of `test_dicom`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest

from msformer.io.dicom import read_dicom
from tests.msformer.io.world import GREY, save_dicom

UID = pydicom.uid


@pytest.mark.parametrize(
    ("syntax", "encode"),
    [
        (UID.JPEGLosslessSV1, lambda pixels: imagecodecs.ljpeg_encode(pixels, bitspersample=16)),
        (UID.JPEGLSLossless, imagecodecs.jpegls_encode),
        (UID.JPEG2000Lossless, lambda pixels: imagecodecs.jpeg2k_encode(pixels, codecformat="j2k", reversible=True)),
    ],
    ids=["jpeg-lossless", "jpeg-ls", "jpeg-2000"],
)
def test_lossless_compression(syntax: str, encode: Callable[[Any], bytes], tmp_path: Path) -> None:
    """As archives keep CT and MR."""
    pixels = np.random.default_rng(0).integers(0, 4000, (24, 32), dtype=np.uint16)
    frames = pydicom.encaps.encapsulate([encode(pixels)])
    path = save_dicom(tmp_path / "a.dcm", pixels, syntax=syntax, PixelData=frames)
    assert np.array_equal(read_dicom(path).pixels, pixels)


def test_rescaling_that_is_not_filled_in(tmp_path: Path) -> None:
    """What is missing is as if it were not there: a slope of 1, an intercept of 0."""
    both = {"RescaleSlope": None, "RescaleIntercept": None}
    assert np.array_equal(read_dicom(save_dicom(tmp_path / "a.dcm", GREY, **both)).pixels, GREY)
    for tags, expected in (({"RescaleIntercept": -3}, GREY - 3), ({"RescaleSlope": 2}, GREY * 2)):
        path = save_dicom(tmp_path / "b.dcm", GREY, **both | tags)
        with pytest.warns(UserWarning, match=r"b\.dcm: Rescale(Slope|Intercept) is missing; [01] is assumed"):
            assert np.array_equal(read_dicom(path).pixels, expected)


@pytest.mark.parametrize("keyword", ["ImagerPixelSpacing", "NominalScannedPixelSpacing"])
def test_spacing_at_the_detector(keyword: str, tmp_path: Path) -> None:
    found = read_dicom(save_dicom(tmp_path / "a.dcm", GREY, **{keyword: [0.3, 0.2]})).geometry
    assert found is not None
    np.testing.assert_allclose(np.linalg.norm(found.affine[:3, :2], axis=0), [0.2, 0.3])


def test_floating_point_pixels_that_are_not_finite(tmp_path: Path) -> None:
    path = save_dicom(tmp_path / "a.dcm", GREY)
    dataset = pydicom.dcmread(path)
    values = GREY.astype(np.float32)
    values[1, 2] = np.nan
    del dataset.PixelData
    dataset.FloatPixelData, dataset.BitsAllocated = values.tobytes(), 32
    dataset.save_as(path, enforce_file_format=True)
    found = read_dicom(path)
    values[1, 2] = 0  # the darkest of the others
    assert np.array_equal(found.pixels, values)
    assert found.background is not None
    assert found.background.nonzero() == (1, 2)
