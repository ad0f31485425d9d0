"""Finding images and masks in every layout, and reading them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile

from msformer.evaluation.layouts import Case, find_cases, read_mask, read_pair
from tests.msformer.evaluation import data


@pytest.mark.parametrize(
    ("layout", "make", "names"),
    [
        ("ph2", data.make_ph2, ["IMD002", "IMD003"]),
        ("isic", data.make_isic, ["ISIC_0000001", "ISIC_0000002"]),
        ("lung", data.make_lung, ["ID_0001_Z_0100"]),
        ("pairs", data.make_pairs, ["a", "b", "c"]),
    ],
)
@pytest.mark.parametrize("given", [True, False], ids=["given", "auto"])
def test_layouts(layout: str, make: Callable[[Path], Path], names: list[str], given: bool, tmp_path: Path) -> None:
    found = find_cases(make(tmp_path), layout if given else "auto")
    assert (found.layout, [case.name for case in found.cases], found.problems) == (layout, names, ())
    for case in found.cases:
        pair = read_pair(case)
        assert pair.truth.shape == tuple(pair.image.shape[1:])
        assert 0.05 < pair.truth.mean() < 0.5
        assert pair.colour == (layout != "lung")
        inside, outside = (pair.image[:, pair.truth == value].mean() for value in (True, False))
        assert inside < outside, "the object is dark in all of them"


def test_window_of_the_lung_layout(tmp_path: Path) -> None:
    case = find_cases(data.make_lung(tmp_path)).cases[0]
    pixels = np.array([[-3000, -512, 0], [256, 512, 3000]], np.int16)
    tifffile.imwrite(case.image, pixels)
    tifffile.imwrite(case.mask, np.ones_like(pixels))
    values = read_pair(case).image[0] * 255
    assert values.round().int().tolist() == [[0, 0, 128], [191, 255, 255]]


def test_masks_in_a_folder_of_their_own_and_names_with_spaces(tmp_path: Path) -> None:
    names = ("Läsion 1 (links)", "病変", "a.b")
    data.make_pairs(tmp_path, names)
    (tmp_path / "masks").rename(tmp_path / "true ones")
    found = find_cases(tmp_path / "images", masks=tmp_path / "true ones")
    assert {case.name for case in found.cases} == set(names)
    one = find_cases(tmp_path / "images" / "a.b.png", masks=tmp_path / "true ones" / "病変.png")
    assert [case.name for case in one.cases] == ["a.b"], "two files are a pair whatever their names"


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    data.make_pairs(tmp_path)
    (tmp_path / "masks" / "b.png").unlink()
    (tmp_path / "images" / "c.png").unlink()
    found = find_cases(tmp_path)
    assert [case.name for case in found.cases] == ["a"]
    assert any("b.png: has no mask" in line for line in found.problems)
    assert any("c.png: has no image" in line for line in found.problems)


def test_a_missing_mask_of_ph2_is_named(tmp_path: Path) -> None:
    data.make_ph2(tmp_path)
    next(tmp_path.rglob("IMD003_lesion.bmp")).unlink()
    found = find_cases(tmp_path)
    assert [case.name for case in found.cases] == ["IMD002"]
    assert len(found.problems) == 1
    assert "IMD003_lesion.bmp: missing" in found.problems[0]


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        find_cases(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="layout: unknown 'dicom'; expected auto, ph2, lung, isic, pairs"):
        find_cases(tmp_path, "dicom")
    data.make_pairs(tmp_path / "pairs")
    with pytest.raises(ValueError, match="no image with a mask in layout ph2"):
        find_cases(tmp_path / "pairs", "ph2")
    with pytest.raises(ValueError, match="masks: is for layout pairs, not ph2"):
        find_cases(tmp_path / "pairs", "ph2", tmp_path / "pairs" / "masks")
    data.save(tmp_path / "pairs" / "masks" / "a_mask.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match="a mask of the same name is"):
        find_cases(tmp_path / "pairs")


def test_mismatched_sizes(tmp_path: Path) -> None:
    image = data.save(tmp_path / "i.png", np.zeros((4, 6, 3), np.uint8))
    mask = data.save(tmp_path / "m.png", np.zeros((6, 4), np.uint8))
    with pytest.raises(ValueError, match=r"m.png: the mask has 6 x 4 pixels, the image 4 x 6"):
        read_pair(Case("i", image, mask))


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P", "LA"])
def test_masks_of_every_kind(mode: str, tmp_path: Path) -> None:
    truth = data.disc()
    path = data.save(tmp_path / "mask.png", truth.astype(np.uint8) * 255, mode)
    assert (read_mask(path) == truth).all()


@pytest.mark.parametrize("value", [0, 255])
def test_empty_and_full_masks(value: int, tmp_path: Path) -> None:
    path = data.save(tmp_path / "mask.png", np.full((5, 7), value, np.uint8))
    assert read_mask(path).mean() == value / 255


def test_masks_of_ones_and_of_jpeg(tmp_path: Path) -> None:
    truth = data.disc()
    assert (read_mask(data.save(tmp_path / "ones.png", truth.astype(np.uint8))) == truth).all()
    jpeg = read_mask(data.save(tmp_path / "lossy.jpg", truth.astype(np.uint8) * 255))
    assert (jpeg != truth).mean() < 0.01, "the ringing of a JPEG is not part of the mask"


def test_a_row_of_pixels(tmp_path: Path) -> None:
    image = data.save(tmp_path / "i.png", np.full((1, 50, 3), 100, np.uint8))
    mask = data.save(tmp_path / "m.png", np.ones((1, 50), np.uint8))
    assert read_pair(Case("i", image, mask)).truth.shape == (1, 50)


@pytest.mark.parametrize("order", [1, -1], ids=["up", "down"])
def test_volumes_give_a_case_for_each_slice_with_a_mask(order: int, tmp_path: Path) -> None:
    truth = data.lungs(48)
    empty = np.zeros_like(truth)
    masks = np.stack([x.T for x in (empty, truth, truth, empty, truth)], axis=2)[:, :, ::order]
    values = np.stack([data.chest(x).T for x in (empty, truth, truth, empty, truth)], axis=2)[:, :, ::order]
    affine = np.diag([-1.0, -1.0, 2.0 * order, 1.0])
    for folder, volume in (("images", values), ("masks", masks.astype(np.uint8))):
        (tmp_path / folder).mkdir()
        nibabel.save(nibabel.Nifti1Image(volume, affine), tmp_path / folder / "patient 1.nii.gz")
    found = find_cases(tmp_path)
    assert [case.name for case in found.cases] == [f"patient 1-slice-{i:03d}" for i in (1, 2, 4)]
    for case in found.cases:
        pair = read_pair(case)
        assert (pair.truth == truth).all()
        assert pair.image[:, pair.truth].max() < 0.1
    nibabel.save(nibabel.Nifti1Image(np.zeros_like(masks, np.uint8), affine), tmp_path / "masks" / "patient 1.nii.gz")
    with pytest.raises(ValueError, match="the mask is empty"):
        find_cases(tmp_path)
