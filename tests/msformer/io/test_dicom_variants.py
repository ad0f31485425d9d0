"""What DICOM and NIfTI files from the field are like, beyond the well-formed ones of `test_dicom` and `test_nifti`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import nibabel
import numpy as np
import pydicom
import pytest

from msformer.io.base import ImageError, default_window
from msformer.io.dicom import read_dicom
from msformer.io.medical import read_slice
from msformer.io.read import is_ct
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


@pytest.mark.parametrize("empty", [("RescaleSlope", "RescaleIntercept"), ("RescaleSlope",)])
def test_rescaling_that_is_not_filled_in(empty: tuple[str, ...], tmp_path: Path) -> None:
    tags = {"RescaleSlope": 2, "RescaleIntercept": -3} | dict.fromkeys(empty)
    assert np.array_equal(read_dicom(save_dicom(tmp_path / "a.dcm", GREY, **tags)).pixels, GREY)


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
    with pytest.raises(ImageError, match=r"a\.dcm: holds NaN or infinite values"):
        read_dicom(path)


@pytest.mark.parametrize("scale", [(1.0, 0.0), (-1.0, 10.0), (0.5, -900.0)])
def test_a_slice_of_tissue_in_a_volume_with_air_is_of_ct(scale: tuple[float, float], tmp_path: Path) -> None:
    """One window and one rule for all slices of a volume, which change when the file does."""
    path = tmp_path / "v.nii"
    for lowest, modality in ((-1000, "CT"), (0, "")):
        values = np.full((6, 5, 2), 40.0)
        values[0, 0, 0] = lowest
        stored = np.rint((values - scale[1]) / scale[0]).astype(np.int16)
        image = nibabel.Nifti1Image(stored, np.diag([-1, -1, 1, 1]))
        image.header.set_data_dtype(np.int16)
        content = bytearray(image.to_bytes())
        content[112:120] = np.array(scale, "<f4").tobytes()  # scl_slope and scl_inter
        path.write_bytes(content)
        os.utime(path, ns=(1, 1 + abs(lowest)))
        found = [read_slice(path, index) for index in (0, 1)]
        assert [slice.modality for slice in found] == [modality] * 2
        assert is_ct(path, 1) == (modality == "CT")
        np.testing.assert_allclose(found[1].pixels, 40, atol=1)
        if modality:
            assert [default_window(slice) for slice in found] == [(-512, 512)] * 2
