"""DICOM and NIfTI: values, windows, how slices are turned, and label maps that land where they belong."""

from __future__ import annotations

import gzip
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as PILImage

from msformer.io.base import ImageError, Slice, apply_window, default_window, show
from msformer.io.dicom import is_dicom, read_dicom
from msformer.io.medical import is_medical
from msformer.io.nifti import count_slices, read_nifti, write_nifti

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")

UID = pydicom.uid
NAME = "name with space ü"
ORIENTATIONS = ["RAS", "LPS", "LAS", "SAR", "PIR", "ILA"]

# one world for all files: voxels to the right, the front, the head
WORLD = np.arange(6 * 5 * 4, dtype=np.int16).reshape(6, 5, 4) * 7 % 113
ANGLE = np.deg2rad(20)
TURN = np.array([[np.cos(ANGLE), -np.sin(ANGLE), 0], [np.sin(ANGLE), np.cos(ANGLE), 0], [0, 0, 1]])
AFFINE = np.eye(4)
AFFINE[:3, :3] = TURN @ np.diag([0.5, 0.75, 3])
AFFINE[:3, 3] = 10, -20, 30

# a shape without symmetry, on rows and columns of the picture of 5 rows and 6 columns
LABELS = np.zeros((5, 6), dtype=np.int64)
LABELS[0, 1:4] = 1
LABELS[1:3, 1] = 2
LABELS[4, 5] = 3


def shown(index: int) -> NDArray[Any]:
    """The world's slice as a radiologist sees it, computed another way than in the package."""
    return np.array([[WORLD[x, y, index] for x in reversed(range(6))] for y in reversed(range(5))])


def world_positions(index: int, label: int) -> NDArray[np.float64]:
    """The positions of the pixels of LABELS that have a label, sorted, when it lies on the world's slice."""
    rows, columns = np.nonzero(np.equal(LABELS, label))
    return sorted_positions(AFFINE, np.stack([5 - columns, 4 - rows, np.full(len(rows), index)], axis=1))


def sorted_positions(affine: NDArray[np.float64], voxels: NDArray[Any]) -> NDArray[np.float64]:
    positions = (voxels @ affine[:3, :3].T + affine[:3, 3]).round(3) + 0.0
    return positions[np.lexsort(positions.T)]


def written_positions(path: Path, label: int) -> NDArray[np.float64]:
    image = nibabel.load(path)
    return sorted_positions(image.affine, np.argwhere(np.asarray(image.dataobj).reshape(image.shape[:3]) == label))


def save_nifti(path: Path, codes: str = "RAS", data: NDArray[Any] = WORLD, affine: NDArray[Any] = AFFINE) -> None:
    """Saves the data, whose axes go to the right, the front and the head, with its axes stored in another order."""
    orientations = nibabel.orientations
    image = nibabel.Nifti1Image(data, affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    turn = orientations.ornt_transform(orientations.io_orientation(affine), orientations.axcodes2ornt(codes))
    image = image.as_reoriented(turn)
    nibabel.save(image, path)


def save_dicom(
    path: Path, pixels: NDArray[Any], photometric: str = "MONOCHROME2", syntax: str | None = None, **tags: Any
) -> Path:
    """Saves native pixels, or encapsulates `PixelData` of the tags for a compressed transfer syntax."""
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID.CTImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    meta.TransferSyntaxUID = syntax or UID.ExplicitVRLittleEndian
    dataset = pydicom.dataset.FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = UID.CTImageStorage, "1.2.3"
    dataset.Rows, dataset.Columns = pixels.shape[-2:] if pixels.ndim == 2 else pixels.shape[-3:-1]
    dataset.SamplesPerPixel = 1 if pixels.ndim == 2 else pixels.shape[-1]
    dataset.PhotometricInterpretation = photometric
    dataset.BitsAllocated = dataset.BitsStored = pixels.dtype.itemsize * 8
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    if dataset.SamplesPerPixel == 3:
        dataset.PlanarConfiguration = 0
    dataset.PixelData = pixels.tobytes()
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    dataset["PixelData"].VR = "OB" if dataset.BitsAllocated == 8 else "OW"
    dataset.save_as(path, enforce_file_format=True)
    return path


def save_world_dicom(path: Path, index: int) -> Path:
    """An axial picture of the world, as DICOM says where it lies."""
    lps = np.diag([-1.0, -1, 1])
    return save_dicom(
        path,
        shown(index),
        Modality="CT",
        ImagePositionPatient=(lps @ (AFFINE @ [5, 4, index, 1])[:3]).tolist(),
        ImageOrientationPatient=np.concatenate([lps @ -TURN[:, 0], lps @ -TURN[:, 1]]).round(12).tolist(),
        PixelSpacing=[0.75, 0.5],
        SliceThickness=3,
    )


GREY = np.arange(20, dtype=np.int16).reshape(4, 5)
COLOUR = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)


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
    assert inverted.window == plain.window == (10, 20)
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
        (40, 400, (-160, 240)),
        ([40.5, -600], [80, 1500], (0.5, 80.5)),
        (None, 400, None),
        (40, None, None),
        (40, 0, None),
    ],
)
def test_window_tags(centre: Any, width: Any, expected: Any, tmp_path: Path) -> None:
    found = read_dicom(save_dicom(tmp_path / "a.dcm", GREY, Modality="CT", WindowCenter=centre, WindowWidth=width))
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


def test_several_frames(tmp_path: Path) -> None:
    path = save_dicom(tmp_path / "a.dcm", GREY, NumberOfFrames=3, PixelData=GREY.tobytes() * 3)
    with pytest.raises(ImageError, match=r"a\.dcm: expected one frame, got 3"):
        read_dicom(path)


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
    assert found.modality == "CT"
    assert default_window(found) == (-512, 512)


@pytest.mark.parametrize("index", [-1, 4])
def test_slice_index_out_of_range(index: int, tmp_path: Path) -> None:
    save_nifti(tmp_path / "a.nii")
    with pytest.raises(ImageError, match=rf"a\.nii: expected a slice index from 0 to 3, got {index}"):
        read_nifti(tmp_path / "a.nii", index)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nifti_that_is_not_finite(value: float, tmp_path: Path) -> None:
    data = WORLD.astype(np.float32)
    data[0, 0, 2] = value
    save_nifti(tmp_path / "a.nii", data=data)
    with pytest.raises(ImageError, match=r"a\.nii: slice 2 holds NaN or infinite values"):
        read_nifti(tmp_path / "a.nii")
    assert np.array_equal(read_nifti(tmp_path / "a.nii", 1).pixels, shown(1))


def test_several_volumes_and_other_kinds_of_values(tmp_path: Path) -> None:
    path = tmp_path / "a.nii"
    nibabel.save(nibabel.Nifti1Image(np.stack([WORLD] * 3, axis=-1), AFFINE), path)
    for read in (read_nifti, count_slices):
        with pytest.raises(ImageError, match=r"a\.nii: expected one volume, got 3"):
            read(path)
    nibabel.save(nibabel.Nifti1Image(WORLD.astype(np.complex64), AFFINE), path)
    with pytest.raises(ImageError, match=r"a\.nii: expected integer or floating-point values, got complex64"):
        read_nifti(path)
    affine = AFFINE.copy()
    affine[:, 0] = 0
    image = nibabel.Nifti1Image(WORLD, None)
    image.header["srow_x"], image.header["srow_y"], image.header["srow_z"] = affine[:3]
    image.header["sform_code"] = 1
    nibabel.save(image, path)
    with pytest.raises(ImageError, match=r"a\.nii: its affine is singular"):
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


def test_same_labels_same_bytes(tmp_path: Path) -> None:
    found = read_dicom(save_world_dicom(tmp_path / "a.dcm", 0))
    for name in ("a.nii.gz", "b.nii.gz", "c.nii"):
        write_nifti(tmp_path / name, [(LABELS, found)])
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert gzip.decompress((tmp_path / "a.nii.gz").read_bytes()) == (tmp_path / "c.nii").read_bytes()


def test_labels_that_cannot_be_written(tmp_path: Path) -> None:
    found = read_dicom(save_world_dicom(tmp_path / "a.dcm", 0))
    for labels in (LABELS - 1, LABELS.astype(np.float32), LABELS.T):
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
    message = rf'needs the package {package}: pip install "msformer\[medical\]"'
    with pytest.raises(ImageError, match=message):
        read_dicom(tmp_path / "a.dcm") if package == "pydicom" else read_nifti(tmp_path / "a.nii")
    if package == "nibabel":
        with pytest.raises(ImageError, match=message):
            write_nifti(tmp_path / "b.nii", [(GREY, found)])
