"""Images and masks as arrays, of every kind of file."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as PILImage

from msformer.evaluation.layouts import Case
from msformer.evaluation.pairs import read_mask, read_pair
from msformer.io.medical import read_slice
from msformer.io.nifti import write_nifti
from tests.msformer.evaluation import data
from tests.msformer.io.world import save_dicom


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


@pytest.mark.parametrize("colour", ["white", "black"])
def test_a_mask_that_lives_in_the_alpha_channel(colour: str, tmp_path: Path) -> None:
    truth = data.disc()
    image = PILImage.new("RGBA", truth.shape[::-1], colour)
    image.putalpha(PILImage.fromarray(truth.astype(np.uint8) * 255))
    image.save(tmp_path / "m.png")
    assert (read_mask(tmp_path / "m.png") == truth).all()


def test_a_row_of_pixels(tmp_path: Path) -> None:
    image = data.save(tmp_path / "i.png", np.full((1, 50, 3), 100, np.uint8))
    mask = data.save(tmp_path / "m.png", np.ones((1, 50), np.uint8))
    assert read_pair(Case("i", image, mask)).truth.shape == (1, 50)


def corner() -> NDArray[np.uint8]:
    """Has no symmetry, as stored in NIfTI, ``[24, 20, 1]``."""
    mask = np.zeros((24, 20, 1), np.uint8)
    mask[2:12, 3:6] = mask[2:4, 3:15] = 1
    return mask


def save_nifti(path: Path, volume: NDArray[np.generic], affine: NDArray[np.float64]) -> Path:
    nibabel.save(nibabel.Nifti1Image(volume, affine), path)
    return path


RAS = np.diag([0.7, 0.7, 2.0, 1.0])
LPS = np.diag([-0.7, -0.7, 2.0, 1.0])
LPS[:2, 3] = 0.7 * 23, 0.7 * 19
"""The same places as `RAS` for 24 x 20 voxels, in the other order."""


@pytest.mark.parametrize(("image", "mask"), [(RAS, RAS), (RAS, LPS), (LPS, RAS), (LPS, LPS)])
def test_a_nifti_mask_lies_where_its_positions_say(
    image: NDArray[np.float64], mask: NDArray[np.float64], tmp_path: Path
) -> None:
    stored = [corner() if affine is RAS else corner()[::-1, ::-1] for affine in (image, mask)]
    pair = read_pair(
        Case(
            "a",
            save_nifti(tmp_path / "i.nii.gz", stored[0].astype(np.int16) * 100, image),
            save_nifti(tmp_path / "m.nii.gz", stored[1], mask),
        )
    )
    assert (pair.truth == (pair.image[0] > 0.5).numpy()).all()


def test_a_shifted_or_scaled_mask_is_taken_for_the_same(tmp_path: Path) -> None:
    image = save_nifti(tmp_path / "i.nii.gz", corner().astype(np.int16) * 100, RAS)
    pair = read_pair(Case("a", image, save_nifti(tmp_path / "m.nii.gz", corner(), np.eye(4))))
    assert (pair.truth == (pair.image[0] > 0.5).numpy()).all()


def test_voxels_in_another_order_at_another_place(tmp_path: Path) -> None:
    """A mask that was written without the positions of its image would silently be mirrored."""
    image = save_nifti(tmp_path / "i.nii.gz", corner().astype(np.int16) * 100, np.diag([-0.7, -0.7, 2, 1]))
    mask = save_nifti(tmp_path / "m.nii.gz", corner(), np.eye(4))
    message = r"m.nii.gz: the voxels of the mask are in the order RAS, those of the image in LPS, and their corners are"
    with pytest.raises(ValueError, match=message):
        read_pair(Case("a", image, mask))


def test_a_mask_cut_in_another_plane(tmp_path: Path) -> None:
    image = save_nifti(tmp_path / "i.nii.gz", corner().astype(np.int16) * 100, RAS)
    mask = save_nifti(tmp_path / "m.nii.gz", corner(), RAS[[0, 2, 1, 3]])
    with pytest.raises(ValueError, match=r"m\.nii\.gz: the mask was cut in another plane than the image"):
        read_pair(Case("a", image, mask))


@pytest.mark.parametrize(
    "axes", [[1, 0, 0, 0, 1, 0], [-1, 0, 0, 0, -1, 0], [0, 1, 0, 0, 0, -1], [-1, 0, 0, 0, 0, -1], [0, 1, 0, 1, 0, 0]]
)
def test_the_nifti_mask_of_a_dicom_picture(axes: list[int], tmp_path: Path) -> None:
    truth = corner()[:, :, 0].T > 0
    tags = {"ImageOrientationPatient": axes, "ImagePositionPatient": [-10, 5, 7], "PixelSpacing": [0.8, 0.7]}
    image = save_dicom(tmp_path / "i.dcm", truth.astype(np.int16) * 100, **tags)
    write_nifti(tmp_path / "m.nii.gz", [(truth, read_slice(image))])
    pair = read_pair(Case("a", image, tmp_path / "m.nii.gz"))
    assert (pair.truth == truth).all()
    assert (pair.truth == (pair.image[0] > 0.5).numpy()).all()


@pytest.mark.parametrize("own", [True, False], ids=["mask with EXIF", "mask on the picture as stored"])
def test_both_are_turned_as_exif_says(own: bool, tmp_path: Path) -> None:
    exif = PILImage.Exif()
    exif[0x0112] = 6
    truth = corner()[:, :, 0] > 0
    PILImage.fromarray(truth.astype(np.uint8) * 200).save(tmp_path / "i.png", exif=exif)
    PILImage.fromarray(truth.astype(np.uint8) * 255).save(tmp_path / "m.png", exif=exif if own else PILImage.Exif())
    if own:
        pair = read_pair(Case("a", tmp_path / "i.png", tmp_path / "m.png"))
    else:
        with pytest.warns(UserWarning, match=r"m\.png: the mask is turned as the EXIF of its image says"):
            pair = read_pair(Case("a", tmp_path / "i.png", tmp_path / "m.png"))
    assert pair.truth.shape == truth.shape[::-1]
    assert (pair.truth == (pair.image[0] > 0.5).numpy()).all()


def test_parts_of_a_mask_and_void(tmp_path: Path) -> None:
    image = data.save(tmp_path / "i.png", data.lesion(data.disc()))
    left, right, unknown = (data.disc() & (np.mgrid[:40, :48][1] % 3 == part) for part in range(3))
    first = data.save(tmp_path / "1.png", np.where(unknown, 255, left).astype(np.uint8))
    second = data.save(tmp_path / "2.png", right.astype(np.uint8) * 255)
    pair = read_pair(Case("a", image, first, more_masks=(second,)))
    assert (pair.truth == left | right).all()
    assert pair.void is not None
    assert (pair.void == unknown).all()
