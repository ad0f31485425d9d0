"""NIfTI files from the field, beyond the well-formed ones of `test_nifti`."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from msformer.io.base import ImageError, default_window, show
from msformer.io.medical import count_slices, is_medical, read_slice, slices_with_labels
from msformer.io.nifti import read_nifti, write_nifti
from msformer.io.read import Reading, is_ct, read_image
from tests.msformer.io.world import AFFINE, ORIENTATIONS, WORLD, save_nifti, shown

FLOATS = WORLD.astype(np.float32)


def patched(path: Path, **fields: tuple[int, str, Any]) -> Path:
    """Overwrites parts of a header: places, formats as of struct, values."""
    content = bytearray(path.read_bytes())
    for place, kind, value in fields.values():
        struct.pack_into(f"<{kind}", content, place, *(value if isinstance(value, tuple) else (value,)))
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_background_that_is_no_number(value: float, tmp_path: Path) -> None:
    """It gets the lowest of the other values, and does not count for the window."""
    data = FLOATS.copy() + 5
    data[:3] = value
    save_nifti(tmp_path / "a.nii", data=data)
    with pytest.warns(UserWarning, match=r"a\.nii: it holds NaN or infinite values, .* for background"):
        found = read_nifti(tmp_path / "a.nii")
    others = shown(2)[:, :3] + 5.0  # the right of the world is on the left of the picture
    assert np.array_equal(found.pixels[:, :3], others)
    assert (found.pixels[:, 3:] == others.min()).all()
    assert default_window(found) == pytest.approx(tuple(np.percentile(others, [0.5, 99.5])))
    assert np.array_equal(show(found)[:, 3:], np.zeros((5, 3)))


def test_a_slice_of_background_alone(tmp_path: Path) -> None:
    data = FLOATS.copy()
    data[..., 1] = np.nan
    save_nifti(tmp_path / "a.nii", data=data)
    assert not read_image(tmp_path / "a.nii", Reading(slice_index=1)).any()
    assert slices_with_labels(tmp_path / "a.nii") == [0, 2, 3]


def test_values_that_float32_cannot_hold(tmp_path: Path) -> None:
    data = WORLD.astype(np.float64)
    data[0, 0, 2], data[1, 0, 2] = 1e300, -1e300
    save_nifti(tmp_path / "a.nii", data=data)
    found = read_nifti(tmp_path / "a.nii")
    assert found.background is None
    assert found.pixels.max() == np.finfo(np.float32).max == -found.pixels.min()


@pytest.mark.parametrize("codes", ORIENTATIONS[:3])
def test_several_volumes(codes: str, tmp_path: Path) -> None:
    """Slices are counted on through all volumes; labels go to a file of the same shape."""
    path = tmp_path / "a.nii.gz"
    save_nifti(path, codes, np.stack([WORLD, WORLD + 200, WORLD * 0], axis=-1))
    assert count_slices(path) == 12
    assert np.array_equal(read_nifti(path, 3).pixels, shown(3))
    assert np.array_equal(read_nifti(path, 4 + 1).pixels, shown(1) + 200)
    with pytest.warns(UserWarning, match="a slice of the first of 3 volumes is read"):
        assert np.array_equal(read_nifti(path).pixels, shown(2))
    with pytest.raises(ImageError, match="expected a slice index from 0 to 11, 3 volumes of 4, got 12"):
        read_nifti(path, 12)
    assert slices_with_labels(path) == list(range(8))
    labels = np.arange(30).reshape(5, 6) % 3
    write_nifti(tmp_path / "b.nii", [(labels, read_nifti(path, 5)), (labels, read_nifti(path, 8))])
    assert nibabel.load(tmp_path / "b.nii").shape == nibabel.load(path).shape
    assert np.array_equal(read_nifti(tmp_path / "b.nii", 5).pixels, labels)
    assert np.array_equal(read_nifti(tmp_path / "b.nii", 8).pixels, labels)
    assert slices_with_labels(tmp_path / "b.nii") == [5, 8]


def test_volumes_along_further_axes(tmp_path: Path) -> None:
    """As of displacement fields: the fourth axis goes first."""
    data = np.stack([np.stack([WORLD, WORLD + 1], -1), np.stack([WORLD + 2, WORLD + 3], -1)], -1)
    save_nifti(tmp_path / "a.nii", data=data)
    assert [int(read_nifti(tmp_path / "a.nii", 4 * i).pixels[0, 0] - shown(0)[0, 0]) for i in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize("codes", ORIENTATIONS[:3])
@pytest.mark.parametrize("names", ["RGB", "RGBA"])
def test_colours(names: str, codes: str, tmp_path: Path) -> None:
    data = np.zeros(WORLD.shape, [(name, "u1") for name in names])
    for number, name in enumerate(names):
        data[name] = WORLD + 10 * number
    save_nifti(tmp_path / "a.nii", codes, data)
    found = read_nifti(tmp_path / "a.nii", 1)
    assert found.pixels.dtype == np.uint8
    assert np.array_equal(found.pixels, shown(1)[..., None] + [0, 10, 20])
    assert np.array_equal(read_image(tmp_path / "a.nii", Reading((0, 5), 1)), found.pixels), "colours have no window"
    write_nifti(tmp_path / "b.nii", [(shown(1), found)])
    assert np.array_equal(read_nifti(tmp_path / "b.nii", 1).pixels, shown(1))


@pytest.mark.parametrize("angle", [10, 40, 50])
def test_oblique_volumes(angle: float, tmp_path: Path) -> None:
    """Shown by the axis that is closest to that of the patient, without resampling; labels keep the affine."""
    turn = np.deg2rad(angle)
    affine = np.eye(4)
    affine[1:3, 1:3] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    nibabel.save(nibabel.Nifti1Image(WORLD, affine), tmp_path / "a.nii")
    along = 2 if angle < 45 else 1
    found = read_nifti(tmp_path / "a.nii", 1)
    assert count_slices(tmp_path / "a.nii") == WORLD.shape[along]
    # beyond 45 degrees the second axis goes up, and the third to the back
    expected = WORLD[::-1, ::-1, 1].T if along == 2 else WORLD[::-1, 1, :].T
    assert np.array_equal(found.pixels, expected)
    write_nifti(tmp_path / "b.nii", [(expected, found)])
    assert np.allclose(nibabel.load(tmp_path / "b.nii").affine, affine)


def two_forms(path: Path, sform: NDArray[Any], qform: NDArray[Any]) -> Path:
    image = nibabel.Nifti1Image(WORLD, sform)
    image.set_sform(sform, 1)
    image.set_qform(qform, 1)
    nibabel.save(image, path)
    return path


def test_sform_and_qform_that_differ(tmp_path: Path) -> None:
    """The sform is taken, as nibabel does; what the qform says otherwise is said."""
    flipped = np.diag([-1.0, 1, 1, 1])
    path = two_forms(tmp_path / "a.nii", np.eye(4), flipped)
    with pytest.warns(UserWarning, match="the sform is taken, with voxels in the order RAS, not LAS"):
        assert np.array_equal(read_nifti(path, 1).pixels, shown(1))
    moved = np.eye(4)
    moved[0, 3] = 7
    found = read_nifti(two_forms(tmp_path / "b.nii", np.eye(4), moved), 1)
    assert found.notes == ("sform and qform put voxels up to 7 mm apart; the sform is taken",)
    assert read_nifti(two_forms(tmp_path / "c.nii", np.eye(4), np.eye(4)), 1).notes == ()


SFORM, QFORM = 254, 252
"""Where the codes are; the rows of the sform begin at 280, the quaternion at 256."""


def test_forms_that_cannot_be_used(tmp_path: Path) -> None:
    flipped = np.diag([-1.0, 1, 1, 1])
    zero = (280, "12f", (0.0,) * 12)
    path = patched(two_forms(tmp_path / "a.nii", np.eye(4), flipped), rows=zero)
    with pytest.warns(UserWarning, match="the sform is unusable and left out"):
        found = read_nifti(path, 1)
    assert np.array_equal(found.pixels, shown(1)[:, ::-1]), "the qform says that the first voxels are on the right"
    bad = (256, "3f", (2.0, 2.0, 2.0))
    path = patched(two_forms(tmp_path / "b.nii", np.eye(4), flipped), quaternion=bad)
    with pytest.warns(UserWarning, match="the qform is unusable and left out"):
        assert np.array_equal(read_nifti(path, 1).pixels, shown(1))
    path = patched(two_forms(tmp_path / "c.nii", np.eye(4), flipped), rows=zero, quaternion=bad)
    with pytest.warns(UserWarning, match="is unusable"):
        found = read_nifti(path, 1)
    assert any("does not say how the patient lies" in note for note in found.notes)
    assert found.pixels.shape == (5, 6)
    write_nifti(tmp_path / "d.nii", [(shown(1), found)])
    nibabel.load(tmp_path / "d.nii").get_fdata()


@pytest.mark.parametrize("sizes", [(0.0, 0.0, 0.0), (-2.0, 1.0, 1.0), (float("nan"), 1.0, 1.0)])
def test_sizes_of_voxels_that_are_none(sizes: tuple[float, ...], tmp_path: Path) -> None:
    path = tmp_path / "a.nii"
    nibabel.save(nibabel.Nifti1Image(WORLD, np.eye(4)), path)
    patched(path, codes=(QFORM, "2h", (0, 0)), sizes=(80, "3f", sizes))
    found = read_nifti(path, 1)
    assert sorted(found.pixels.reshape(-1)) == sorted(shown(1).reshape(-1))
    assert found.geometry is not None
    assert np.isfinite(found.geometry.affine).all()


@pytest.mark.parametrize(("name", "packed"), [("a.nii", True), ("a.nii.gz", False), ("a", True), ("a", False)])
def test_compression_is_known_by_the_content(name: str, packed: bool, tmp_path: Path) -> None:
    save_nifti(tmp_path / "whole.nii")
    content = (tmp_path / "whole.nii").read_bytes()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if packed else content)
    assert is_medical(path)
    assert count_slices(path) == 4
    assert np.array_equal(read_slice(path, 1).pixels, shown(1))


@pytest.mark.parametrize(
    ("slope", "inter", "expected", "warning"),
    [
        (0.0, 9.0, (1, 0), None),
        (float("nan"), float("nan"), (1, 0), None),
        (float("inf"), 0.0, (1, 0), "scl_slope: expected a number, got inf"),
        (float("nan"), 3.0, (1, 0), "scl_slope: expected a number, got nan"),
        (2.0, float("nan"), (2, 0), "scl_inter: expected a number, got nan; 0 is assumed"),
        (-2.0, 3.0, (-2, 3), None),
        (1e-3, 0.0, (1e-3, 0), None),
    ],
)
def test_scales(slope: float, inter: float, expected: tuple[float, float], warning: str | None, tmp_path: Path) -> None:
    save_nifti(tmp_path / "a.nii")
    path = patched(tmp_path / "a.nii", scale=(112, "2f", (slope, inter)))
    if warning is None:
        found = read_nifti(path, 1)
    else:
        with pytest.warns(UserWarning, match=warning):
            found = read_nifti(path, 1)
    np.testing.assert_allclose(found.pixels, shown(1) * expected[0] + expected[1], rtol=1e-6)


@pytest.mark.parametrize(
    "field",
    [
        (0, "i", 999),  # the size of the header
        (72, "h", 99),  # bits a voxel
        (108, "f", 0.0),  # where the voxels begin
        (108, "f", 340.0),
        (344, "4s", b"abcd"),  # the magic string
        (76, "f", 5.0),  # qfac
        (SFORM, "h", 77),
        (123, "b", 99),  # units
    ],
)
def test_headers_that_are_wrong(field: tuple[int, str, Any], tmp_path: Path) -> None:
    save_nifti(tmp_path / "a.nii")
    assert np.array_equal(read_nifti(patched(tmp_path / "a.nii", it=field), 1).pixels, shown(1))


def test_voxels_in_another_file(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Pair(WORLD, AFFINE), tmp_path / "a.hdr")
    os.rename(tmp_path / "a.hdr", tmp_path / "a.nii")
    with pytest.raises(ImageError, match=r"a\.nii: its voxels are in another file \(\.img\)"):
        read_nifti(tmp_path / "a.nii")


HIGH = np.full((6, 5, 2), 40, np.int16)
AIR = HIGH.copy()
AIR[0, 0, 0] = -1000


@pytest.mark.parametrize(
    ("name", "values", "sidecar", "modality", "source"),
    [
        ("phase.nii", AIR, "", "", ""),
        ("patient-CT_7.nii.gz", AIR, "", "CT", "the name and the values"),
        ("ct.nii", HIGH, "", "", ""),
        ("section.nii", AIR, "", "", ""),
        ("a.nii.gz", AIR, '{"Modality": "CT"}', "CT", "a.json"),
        ("ct.nii.gz", AIR, '{"Modality": " mr "}', "MR", "ct.json"),
        ("a.nii.gz", AIR, '{"Modality": 3}', "", ""),
        ("a.nii.gz", AIR, "[1", "", ""),
    ],
)
def test_modality(name: str, values: NDArray[Any], sidecar: str, modality: str, source: str, tmp_path: Path) -> None:
    """Never by values alone; of all slices of a volume the same; what the user says goes before all."""
    path = tmp_path / name
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
    if sidecar:
        (tmp_path / f"{name.partition('.')[0]}.json").write_text(sidecar)
    for index in (0, 1):
        found = read_slice(path, index)
        assert (found.modality, found.modality_source) == (modality, source)
        assert (default_window(found) == (-512, 512)) == (modality == "CT")
    assert is_ct(path) == (modality == "CT")
    assert is_ct(path, Reading(modality="CT"))
    assert not is_ct(path, Reading(modality="MR"))
    assert read_slice(path, 0, "CT").modality_source == ("the user")


def test_values_like_those_of_air_are_pointed_out(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(AIR, np.eye(4)), tmp_path / "a.nii")
    with pytest.warns(UserWarning, match=r"a\.nii: it has values as low as CT, .* if it is, say --modality CT"):
        read_slice(tmp_path / "a.nii", 0)
