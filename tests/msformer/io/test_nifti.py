"""NIfTI, and DICOM beside it: how slices are turned, and label maps that land where they belong."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msformer.io.base import ImageError, Slice, apply_window, default_window
from msformer.io.dicom import is_dicom, read_dicom
from msformer.io.medical import is_medical
from msformer.io.nifti import count_slices, read_nifti, write_nifti
from tests.msformer.io.world import (
    AFFINE,
    GREY,
    LABELS,
    NAME,
    ORIENTATIONS,
    WORLD,
    save_dicom,
    save_nifti,
    save_world_dicom,
    shown,
    world_positions,
    written_positions,
)

nibabel = pytest.importorskip("nibabel")


def test_is_medical(tmp_path: Path) -> None:
    path = save_dicom(tmp_path / "no suffix", GREY)
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    assert is_dicom(path)
    assert is_medical(str(path))
    assert not is_medical(tmp_path / "a.png")
    assert not is_medical(tmp_path)
    assert not is_dicom(tmp_path / "missing.dcm")
    assert all(is_medical(tmp_path / f"missing{suffix}") for suffix in (".dcm", ".DICOM", ".nii", ".NII.gz"))
    assert not is_medical(tmp_path / "a.gz")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".NII.GZ"])
@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_any_orientation_shows_the_same_picture(codes: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"{NAME}{suffix}"
    save_nifti(path, codes)
    assert count_slices(path) == 4
    assert np.array_equal(read_nifti(path).pixels, shown(2))
    for index in range(4):
        found = read_nifti(path, index)
        assert found.pixels.dtype == np.float32
        assert np.array_equal(found.pixels, shown(index))


def test_dicom_and_nifti_show_the_same_picture(tmp_path: Path) -> None:
    save_nifti(tmp_path / "a.nii", "SAR")
    assert np.array_equal(
        read_dicom(save_world_dicom(tmp_path / "a.dcm", 1)).pixels, read_nifti(tmp_path / "a.nii", 1).pixels
    )


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_labels_land_on_the_voxels_of_a_nifti(codes: str, suffix: str, tmp_path: Path) -> None:
    source, target = tmp_path / f"{NAME}{suffix}", tmp_path / f"{NAME}.labels{suffix}"
    save_nifti(source, codes)
    image = nibabel.load(source)
    for index in (0, 1, 3):
        write_nifti(target, [(LABELS, read_nifti(source, index))])
        written = nibabel.load(target)
        assert written.shape == image.shape
        assert written.get_data_dtype() == np.uint8
        assert np.array_equal(written.affine, image.affine)
        assert np.array_equal(read_nifti(target, index).pixels, LABELS)
        for label in (1, 2, 3):
            assert np.array_equal(written_positions(target, label), world_positions(index, label))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_labels_land_on_the_voxels_of_a_dicom(tmp_path: Path) -> None:
    target = tmp_path / f"{NAME}.nii.gz"
    write_nifti(target, [(LABELS, read_dicom(save_world_dicom(tmp_path / "a.dcm", 1)))])
    written = nibabel.load(target)
    assert written.shape == (6, 5, 1)
    assert np.array_equal(np.asarray(written.dataobj)[:, :, 0], LABELS.T)
    assert written.header["sform_code"] == written.header["qform_code"] == 1
    assert np.allclose(written.get_qform(), written.affine, atol=1e-4)
    assert np.allclose(written.header.get_zooms(), [0.5, 0.75, 3])
    assert np.array_equal(read_nifti(target).pixels, LABELS)
    for label in (1, 2, 3):
        assert np.allclose(written_positions(target, label), world_positions(1, label), atol=2e-3)


def test_sagittal_dicom_lies_where_it_says(tmp_path: Path) -> None:
    tags: dict[str, Any] = {
        "ImagePositionPatient": [-7, -100, 50],
        "ImageOrientationPatient": [0, 1, 0, 0, 0, -1],
        "PixelSpacing": [2, 3],
    }
    found = read_dicom(save_dicom(tmp_path / "a.dcm", GREY, **tags))
    write_nifti(tmp_path / "a.nii", [((GREY == 13).astype(np.uint8), found)])  # row 2, column 3
    assert np.array_equal(written_positions(tmp_path / "a.nii", 1), [[7, 100 - 9, 50 - 4]])
    assert np.array_equal(read_nifti(tmp_path / "a.nii").pixels, GREY == 13)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_a_single_slice_along_another_axis(codes: str, axis: int, tmp_path: Path) -> None:
    data = WORLD.take([2], axis)
    save_nifti(tmp_path / "a.nii", codes, data)
    expected = data[0, ::-1, ::-1].T if axis == 0 else data[::-1, 0, ::-1].T
    found = read_nifti(tmp_path / "a.nii")
    assert count_slices(tmp_path / "a.nii") == 1
    assert np.array_equal(found.pixels, expected)
    write_nifti(tmp_path / "b.nii", [(expected, found)])
    assert np.array_equal(nibabel.load(tmp_path / "b.nii").dataobj, nibabel.load(tmp_path / "a.nii").dataobj)


@pytest.mark.parametrize("extra", [(-1,), (-1, 1), (-1, 1, 1)])
def test_pictures_and_volumes_with_more_axes(extra: tuple[int, ...], tmp_path: Path) -> None:
    data = WORLD[:, :, 1].reshape(6, 5, *extra[1:])
    nibabel.save(nibabel.Nifti1Image(data, AFFINE), tmp_path / "a.nii.gz")
    found = read_nifti(tmp_path / "a.nii.gz")
    assert np.array_equal(found.pixels, shown(1))
    write_nifti(tmp_path / "b.nii.gz", [(shown(1), found)])
    written = nibabel.load(tmp_path / "b.nii.gz")
    assert written.shape == data.shape
    assert np.array_equal(written.dataobj, data)


def test_nifti_header_is_kept_where_it_tells_the_place(tmp_path: Path) -> None:
    image = nibabel.Nifti2Image(WORLD, AFFINE)
    qform = AFFINE @ np.diag([-1, 1, 1, 1])
    image.set_sform(AFFINE, code=4)
    image.set_qform(qform, code=2)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"a name"
    image.header["cal_max"] = 90
    nibabel.save(image, tmp_path / "a.nii")
    found = read_nifti(tmp_path / "a.nii", 0)
    assert found.window == (0, 90)
    write_nifti(tmp_path / "b.nii", [(LABELS, found)])
    header = nibabel.load(tmp_path / "b.nii").header
    assert isinstance(header, nibabel.Nifti2Header)
    assert (header["sform_code"], header["qform_code"], header["descrip"], header["cal_max"]) == (4, 2, b"", 0)
    assert np.array_equal(header.get_sform(), image.header.get_sform())
    assert np.array_equal(header.get_qform(), image.header.get_qform())
    assert header.get_xyzt_units() == ("mm", "sec")


def test_scaled_values(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(WORLD, AFFINE)
    image.header.set_slope_inter(2, -1024)
    nibabel.save(image, tmp_path / "a.nii")  # nibabel divides what it writes by the slope: put the stored values back
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[352:] = WORLD.tobytes(order="F")
    (tmp_path / "a.nii").write_bytes(content)
    found = read_nifti(tmp_path / "a.nii", 3)
    assert np.array_equal(found.pixels, shown(3) * 2.0 - 1024)
    assert found.modality == ""
    found = read_nifti(tmp_path / "a.nii", 3, modality="CT")
    assert found.modality == "CT"
    assert default_window(found) == (-512, 512)


@pytest.mark.parametrize("index", [-1, 4])
def test_slice_index_out_of_range(index: int, tmp_path: Path) -> None:
    save_nifti(tmp_path / "a.nii")
    with pytest.raises(ImageError, match=rf"a\.nii: expected a slice index from 0 to 3, got {index}"):
        read_nifti(tmp_path / "a.nii", index)


def test_complex_values(tmp_path: Path) -> None:
    path = tmp_path / "a.nii"
    nibabel.save(nibabel.Nifti1Image(WORLD.astype(np.complex64), AFFINE), path)
    with pytest.raises(ImageError, match=r"a\.nii: expected integers, floating-point values or colours, got complex64"):
        read_nifti(path)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_damaged_nifti(suffix: str, tmp_path: Path) -> None:
    whole = tmp_path / f"whole{suffix}"
    save_nifti(whole, data=np.random.default_rng(0).normal(size=(16, 16, 16)))
    content = whole.read_bytes()
    for name, part in {"text": b"no picture" * 50, "empty": b"", "truncated": content[: len(content) // 2]}.items():
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(part)
        with pytest.raises(ImageError, match=rf"{name}{suffix}: (not a NIfTI|damaged)"):
            read_nifti(path, 15)
    with pytest.raises(FileNotFoundError, match="missing"):
        read_nifti(tmp_path / f"missing{suffix}")


def test_apply_window() -> None:
    pixels = np.array([[-600, -512, 0], [2.1, 512, 3000]], dtype=np.float32)
    assert np.array_equal(apply_window(pixels, -512, 512), [[0, 0, 128], [128, 255, 255]])
    assert apply_window(pixels, -512, 512).dtype == np.uint8
    for low, high in ((1, 1), (2, 1), (np.nan, 1), (0, np.inf)):
        with pytest.raises(ValueError, match="window: expected low < high"):
            apply_window(pixels, low, high)


def test_default_window_without_any_hint() -> None:
    pixels = np.arange(1000, dtype=np.float32).reshape(20, 50)
    assert default_window(Slice(pixels)) == tuple(np.percentile(pixels, [0.5, 99.5]))
    assert default_window(Slice(pixels, (3, 4), modality="CT")) == (3, 4)
    spot = np.zeros((50, 50), dtype=np.float32)
    spot[3, 3] = 9
    assert default_window(Slice(spot)) == (0, 9)
    for value in (0, -3.5, 1e9):
        constant = Slice(np.full((4, 4), value, dtype=np.float32))
        assert not apply_window(constant.pixels, *default_window(constant)).any()


@pytest.mark.parametrize(("most", "expected"), [(255, np.uint8), (256, np.uint16), (70000, np.uint32)])
def test_smallest_type_for_labels(most: int, expected: type, tmp_path: Path) -> None:
    save_nifti(tmp_path / "a.nii")
    write_nifti(tmp_path / "b.nii.gz", [(np.where(LABELS > 0, most, 0), read_nifti(tmp_path / "a.nii"))])
    written = nibabel.load(tmp_path / "b.nii.gz")
    assert written.get_data_dtype() == expected
    assert np.asarray(written.dataobj).max() == most


def test_values_between_labels(tmp_path: Path) -> None:
    """Of an oblique volume: values lie on the voxels that the labels of the same pixels lie on."""
    save_nifti(tmp_path / "a.nii")
    found = read_nifti(tmp_path / "a.nii")
    for name, values in (("labels", LABELS), ("values", (LABELS / 4).astype(np.float32))):
        write_nifti(tmp_path / f"{name}.nii.gz", [(values, found)])
    values, labels = (nibabel.load(tmp_path / f"{name}.nii.gz") for name in ("values", "labels"))
    assert values.get_data_dtype() == np.float32
    np.testing.assert_array_equal(np.asarray(values.dataobj), np.asarray(labels.dataobj) / 4)


def test_same_labels_same_bytes(tmp_path: Path) -> None:
    found = read_dicom(save_world_dicom(tmp_path / "a.dcm", 0))
    for name in ("a.nii.gz", "b.nii.gz", "c.nii"):
        write_nifti(tmp_path / name, [(LABELS, found)])
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert gzip.decompress((tmp_path / "a.nii.gz").read_bytes()) == (tmp_path / "c.nii").read_bytes()


def test_labels_that_cannot_be_written(tmp_path: Path) -> None:
    found = read_dicom(save_world_dicom(tmp_path / "a.dcm", 0))
    for labels in (LABELS - 1, LABELS.astype(np.float64), LABELS.T):
        with pytest.raises(ValueError, match="labels: expected"):
            write_nifti(tmp_path / "a.nii", [(labels, found)])
    with pytest.raises(ValueError, match=r"path: expected a name ending in \.nii or \.nii\.gz"):
        write_nifti(tmp_path / "a.png", [(LABELS, found)])
    with pytest.raises(ValueError, match="slice: has no geometry"):
        write_nifti(tmp_path / "a.nii", [(LABELS, Slice(found.pixels))])
    assert not (tmp_path / "a.nii").exists()


@pytest.mark.parametrize("package", ["pydicom", "nibabel"])
def test_missing_package(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_dicom(save_dicom(tmp_path / "a.dcm", GREY))
    save_nifti(tmp_path / "a.nii")
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"{package} is not installed; run: pip install 'msformer\[medical\]'"
    with pytest.raises(ImageError, match=message):
        read_dicom(tmp_path / "a.dcm") if package == "pydicom" else read_nifti(tmp_path / "a.nii")
    if package == "nibabel":
        with pytest.raises(ImageError, match=message):
            write_nifti(tmp_path / "b.nii", [(GREY, found)])
