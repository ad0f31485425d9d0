"""Finding images and masks in every layout."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile

from msformer.evaluation.layouts import find_cases
from msformer.evaluation.pairs import read_pair
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
    data.make_ph2(tmp_path / "ph2")
    for mask in (tmp_path / "ph2").rglob("*_lesion.bmp"):
        mask.unlink()
    with pytest.raises(ValueError, match=r"no image with a mask in layout ph2 or .*: .*IMD002_lesion\.bmp: missing"):
        find_cases(tmp_path / "ph2")


def test_masks_with_an_ending(tmp_path: Path) -> None:
    """A mask of the very same name comes before one with an ending."""
    data.make_pairs(tmp_path, ("a", "b_lesion", "c"))
    (tmp_path / "masks" / "c.png").rename(tmp_path / "masks" / "C_Mask.PNG")
    data.save(tmp_path / "masks" / "a_mask.png", np.zeros((4, 4), np.uint8))
    found = find_cases(tmp_path)
    assert [(case.name, case.mask.name) for case in found.cases] == [
        ("a", "a.png"),
        ("b_lesion", "b_lesion.png"),
        ("c", "C_Mask.PNG"),
    ]
    assert [line.split("/")[-1] for line in found.problems] == ["a_mask.png: has no image"]


def test_images_and_masks_in_one_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        data.save(tmp_path / f"{name}.png", data.lesion(data.disc()))
        data.save(tmp_path / f"{name}_mask.png", data.disc().astype(np.uint8))
    for found in (find_cases(tmp_path), find_cases(tmp_path, masks=tmp_path)):
        assert (found.layout, [case.name for case in found.cases], found.problems) == ("pairs", ["a", "b"], ())
    (tmp_path / "Masks").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"{name}_mask.png").rename(tmp_path / "Masks" / f"{name}.png")
    assert [case.name for case in find_cases(tmp_path).cases] == ["a", "b"]


def test_accents_and_case(tmp_path: Path) -> None:
    """Some systems write an accent as a letter of its own."""
    mask = data.disc().astype(np.uint8)
    data.save(tmp_path / "Images" / unicodedata.normalize("NFC", "Läsion.PNG"), data.lesion(data.disc()))
    data.save(tmp_path / "Masks" / unicodedata.normalize("NFD", "läsion.png"), mask)
    found = find_cases(tmp_path)
    assert len(found.cases) == 1
    assert found.problems == ()


def test_ph2_in_upper_case(tmp_path: Path) -> None:
    data.make_ph2(tmp_path)
    for path in list(tmp_path.rglob("*.bmp")):
        path.rename(path.with_suffix(".BMP"))
    found = find_cases(tmp_path)
    assert (found.layout, len(found.cases), found.problems) == ("ph2", 2, ())


def test_the_same_name_twice(tmp_path: Path) -> None:
    """The first is taken, the others are named."""
    data.make_ph2(tmp_path / "ph2")
    data.make_ph2(tmp_path / "ph2" / "copy")
    found = find_cases(tmp_path / "ph2")
    assert [case.name for case in found.cases] == ["IMD002", "IMD003"]
    assert len(found.problems) == 2
    assert all("an image of the same name is" in line for line in found.problems)
    data.make_pairs(tmp_path / "pairs")
    data.save(tmp_path / "pairs" / "images" / "b.jpg", data.lesion(data.disc()))
    data.save(tmp_path / "pairs" / "masks" / "c.bmp", data.disc().astype(np.uint8))
    found = find_cases(tmp_path / "pairs")
    assert [case.name for case in found.cases] == ["a", "b"]
    assert any("b.png: an image of the same name is" in line for line in found.problems)
    assert any("c.png: has several masks: " in line for line in found.problems)


def test_an_image_is_not_its_own_mask(tmp_path: Path) -> None:
    image = data.save(tmp_path / "a.png", data.lesion(data.disc()))
    for masks in (None, image):
        with pytest.raises(ValueError, match=r"a\.png: has no mask"):
            find_cases(image, masks=masks)


def test_a_mask_of_another_image_is_not_taken(tmp_path: Path) -> None:
    data.make_pairs(tmp_path, ("a", "a_lesion"))
    (tmp_path / "masks" / "a.png").unlink()
    found = find_cases(tmp_path)
    assert [(case.name, case.mask.name) for case in found.cases] == [("a_lesion", "a_lesion.png")]
    assert len(found.problems) == 1
    assert "a.png: has no mask" in found.problems[0]


def test_a_folder_for_each_patient(tmp_path: Path) -> None:
    for number, patient in enumerate(("p1", "p2")):
        for name in ("1", f"only {patient}"):
            truth = data.disc(radius=8 + number)
            data.save(tmp_path / "images" / patient / f"{name}.png", data.lesion(truth))
            data.save(tmp_path / "masks" / patient / f"{name}.png", truth.astype(np.uint8))
    found = find_cases(tmp_path)
    assert [case.name for case in found.cases] == ["only p1", "only p2", "p1/1", "p2/1"]
    assert all(case.image.parent.name == case.mask.parent.name for case in found.cases)
    assert found.problems == ()


def test_names_that_differ_in_case_only(tmp_path: Path) -> None:
    names = ("Lesion", "lesion", "Mass", "Maß")
    data.make_pairs(tmp_path, names)
    if len(list((tmp_path / "images").iterdir())) < len(names):
        pytest.skip("this file system takes them for the same")
    found = find_cases(tmp_path)
    assert [case.name for case in found.cases] == sorted(names)
    assert all(case.image.name == case.mask.name for case in found.cases)


def test_masks_that_are_links_to_one_file(tmp_path: Path) -> None:
    data.make_pairs(tmp_path)
    for name in ("b", "c"):
        (tmp_path / "masks" / f"{name}.png").unlink()
        (tmp_path / "masks" / f"{name}.png").symlink_to(tmp_path / "masks" / "a.png")
    found = find_cases(tmp_path)
    assert ([case.name for case in found.cases], found.problems) == (["a", "b", "c"], ())


def test_ph2_behind_links(tmp_path: Path) -> None:
    root = data.make_ph2(tmp_path / "store") / "PH2 Dataset images"
    (tmp_path / "ph2").mkdir()
    for case in root.iterdir():
        (tmp_path / "ph2" / case.name).symlink_to(case)
    (root / "IMD002" / "loop").symlink_to(tmp_path / "ph2")
    found = find_cases(tmp_path / "ph2")
    assert (found.layout, [case.name for case in found.cases]) == ("ph2", ["IMD002", "IMD003"])


def test_earlier_results_are_no_data(tmp_path: Path) -> None:
    data.make_isic(tmp_path)
    data.save(tmp_path / "report" / "maps" / "otsu" / "ISIC_0000001.png", data.disc().astype(np.uint8))
    found = find_cases(tmp_path, exclude=(tmp_path / "report",))
    assert (len(found.cases), found.problems) == (2, ())


def test_a_volume_that_cannot_be_read_does_not_stop_the_others(tmp_path: Path) -> None:
    data.make_pairs(tmp_path)
    (tmp_path / "masks" / "b.png").unlink()
    (tmp_path / "masks" / "b.nii.gz").write_bytes(b"junk")
    volume = nibabel.Nifti1Image(np.zeros((48, 40, 3), np.uint8), np.eye(4))
    (tmp_path / "masks" / "c.png").unlink()
    nibabel.save(volume, tmp_path / "masks" / "c.nii.gz")
    found = find_cases(tmp_path)
    assert [case.name for case in found.cases] == ["a"]
    assert any("b.nii.gz: not a NIfTI file" in line for line in found.problems)
    expected = "c.nii.gz: the number of slices of the mask is 3, that of the image 1"
    assert any(expected in line for line in found.problems)


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
        pair = read_pair(replace(case, modality="CT"))
        assert (pair.truth == truth).all()
        assert pair.image[:, pair.truth].max() < 0.1
    nibabel.save(nibabel.Nifti1Image(np.zeros_like(masks, np.uint8), affine), tmp_path / "masks" / "patient 1.nii.gz")
    with pytest.raises(ValueError, match="the mask is empty"):
        find_cases(tmp_path)


def test_several_masks_an_image(tmp_path: Path) -> None:
    """As BUSI has them; their union is the object."""
    disc, left = data.disc(), np.mgrid[:40, :48][1] < 24
    for name, images, masks in (("one", "", ""), ("two", "images", "masks")):
        data.save(tmp_path / name / images / "benign (1).png", data.lesion(disc))
        data.save(tmp_path / name / masks / "benign (1)_mask.png", (disc & left).astype(np.uint8))
        data.save(tmp_path / name / masks / "benign (1)_mask_1.png", (disc & ~left).astype(np.uint8))
        found = find_cases(tmp_path / name)
        assert ([case.name for case in found.cases], found.problems) == (["benign (1)"], ())
        assert (read_pair(found.cases[0]).truth == disc).all()
    (tmp_path / "one" / "benign (1)_mask.bmp").write_bytes((tmp_path / "one" / "benign (1)_mask.png").read_bytes())
    with pytest.raises(ValueError, match=r"has several masks: .*mask.bmp, .*mask.png"):
        find_cases(tmp_path / "one")


def test_masks_with_nothing_but_a_number(tmp_path: Path) -> None:
    data.make_pairs(tmp_path, ("a", "b_1", "c"))
    for old, new in (("a", "a_2"), ("c", "c_1")):
        (tmp_path / "masks" / f"{old}.png").rename(tmp_path / "masks" / f"{new}.png")
    data.save(tmp_path / "masks" / "a_1.png", data.disc().astype(np.uint8))
    found = find_cases(tmp_path)
    masks = [[mask.name for mask in (case.mask, *case.more_masks)] for case in found.cases]
    assert masks == [["a_1.png", "a_2.png"], ["b_1.png"], ["c_1.png"]]


def test_a_folder_for_each_image(tmp_path: Path) -> None:
    """As microscopy has them, a mask for each of its parts."""
    disc, left = data.disc(), np.mgrid[:40, :48][1] < 24
    for name in ("f00d", "beef"):
        data.save(tmp_path / name / "images" / f"{name}.png", data.lesion(disc))
        for part, mask in (("123", disc & left), ("456", disc & ~left)):
            data.save(tmp_path / name / "masks" / f"{part}.png", mask.astype(np.uint8) * 255)
    (tmp_path / "beef" / "masks").rename(tmp_path / "masks of beef")
    (tmp_path / "empty" / "images").mkdir(parents=True)
    (tmp_path / "empty" / "masks").mkdir()
    found = find_cases(tmp_path)
    assert [case.name for case in found.cases] == ["f00d"]
    assert (read_pair(found.cases[0]).truth == disc).all()
    assert any("no images" in line for line in found.problems)


@pytest.mark.parametrize("folders", [("imagesTr", "labelsTr"), ("images", "labels")])
def test_channels(folders: tuple[str, str], tmp_path: Path) -> None:
    """As nnU-Net names them; the first is taken."""
    volume = np.random.default_rng(0).normal(size=(20, 16, 3)).astype(np.float32)
    for folder in folders:
        (tmp_path / folder).mkdir()
    for name in ("case_001_0000", "case_001_0001", "case_002_0000"):
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / folders[0] / f"{name}.nii.gz")
    for name in ("case_001", "case_002"):
        labels = (volume > 1).astype(np.uint8) * 2
        labels[..., 0] = 1
        nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), tmp_path / folders[1] / f"{name}.nii.gz")
    found = find_cases(tmp_path, labels=(2,))
    assert [case.name for case in found.cases] == [f"case_00{i}-slice-00{k}" for i in (1, 2) for k in (1, 2)]
    assert [line.split("/")[-1] for line in found.problems] == ["case_001_0000.nii.gz"]
    assert "case_001_0001.nii.gz: another channel of" in found.problems[0]
    assert len(find_cases(tmp_path).cases) == 6


def test_gif_masks(tmp_path: Path) -> None:
    data.save(tmp_path / "images" / "21_training.tif", data.lesion(data.disc()))
    data.save(tmp_path / "masks" / "21_training.gif", data.disc().astype(np.uint8) * 255)
    found = find_cases(tmp_path)
    assert (read_pair(found.cases[0]).truth == data.disc()).all()
