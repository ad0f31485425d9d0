"""What is object in the file of a mask."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageFilter

from msformer.evaluation.layouts import Case
from msformer.evaluation.masks import LabelNeeded, parse_labels, read_mask, read_truth
from msformer.evaluation.pairs import check_labels
from tests.msformer.evaluation import data

DISC = data.disc()
RING = data.disc(radius=14) & ~DISC
CLASSES = (DISC * 1 + RING * 2).astype(np.uint8)


def save(path: Path, pixels: NDArray[np.generic], **options: object) -> Path:
    PILImage.fromarray(pixels).save(path, **options)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "JPEG2000"])
@pytest.mark.parametrize("value", [100, 255])
def test_lossy_masks_under_any_name(kind: str, value: int, tmp_path: Path) -> None:
    """The noise around the border is no object."""
    options = {"quality_mode": "rates", "quality_layers": [3], "irreversible": True} if kind == "JPEG2000" else {}
    path = save(tmp_path / "m.png", (DISC * value).astype(np.uint8), format=kind, **options)
    assert (read_mask(path) != DISC).sum() <= 30


def test_a_lossy_mask_written_again_without_loss(tmp_path: Path) -> None:
    with PILImage.open(save(tmp_path / "m.jpg", (DISC * 255).astype(np.uint8), quality=50)) as image:
        image.save(tmp_path / "m.png")
    assert (read_mask(tmp_path / "m.png") != DISC).sum() <= 30


@pytest.mark.parametrize("value", [0, 255])
def test_a_lossy_mask_of_one_colour(value: int, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 4, DISC.shape)
    path = save(tmp_path / "m.jpg", np.abs(value - noise).astype(np.uint8), quality=90)
    assert read_mask(path).mean() == value // 255


@pytest.mark.parametrize("top", [100, 255])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_soft_masks(top: int, dtype: type, tmp_path: Path) -> None:
    large = np.kron(DISC, np.ones((4, 4), np.uint8)) * 255
    soft = np.asarray(PILImage.fromarray(large.astype(np.uint8)).filter(ImageFilter.GaussianBlur(3)))
    scaled = (soft / 255 * top).round()
    values = scaled * 40 if dtype == np.uint16 else scaled / 255 if dtype == np.float32 else scaled
    tifffile.imwrite(tmp_path / "m.tif", values.astype(dtype))
    expected = values > 0.5 if dtype == np.float32 else large > 0
    assert (read_mask(tmp_path / "m.tif") != expected).mean() < 0.005


def test_labels(tmp_path: Path) -> None:
    path = save(tmp_path / "m.png", CLASSES)
    with pytest.raises(LabelNeeded, match=r"m\.png: holds the labels 1, 2; say which is the object: --label 1, or all"):
        read_mask(path)
    assert (read_mask(path, labels=(1,)) == DISC).all()
    assert (read_mask(path, labels=(2,)) == RING).all()
    assert (read_mask(path, labels=(1, 2)) == DISC | RING).all()
    assert (read_mask(path, labels=()) == DISC | RING).all()
    assert not read_mask(path, labels=(3,)).any()


@pytest.mark.parametrize("values", [(128, 255), (50, 100), (1, 300)])
def test_labels_far_apart(values: tuple[int, int], tmp_path: Path) -> None:
    """What fills areas is no soft border."""
    pixels = np.where(DISC, values[0], np.where(RING, values[1], 0)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "m.tif", pixels)
    with pytest.raises(LabelNeeded, match=f"labels {values[0]}, {values[1]};"):
        read_mask(tmp_path / "m.tif")
    assert (read_mask(tmp_path / "m.tif", labels=values[:1]) == DISC).all()


def test_many_objects_of_a_number_each(tmp_path: Path) -> None:
    numbers = np.kron(np.arange(1, 401).reshape(20, 20), np.ones((5, 5), int))
    numbers[:, ::5] = 0
    tifffile.imwrite(tmp_path / "m.tif", numbers.astype(np.uint16))
    with pytest.raises(LabelNeeded, match=r"labels 1, 2, 3, .* and 388 more"):
        read_mask(tmp_path / "m.tif")
    assert (read_mask(tmp_path / "m.tif", labels=()) == (numbers > 0)).all()


@pytest.mark.parametrize("labels", [None, (1,), ()])
def test_void(labels: tuple[int, ...] | None, tmp_path: Path) -> None:
    path = save(tmp_path / "m.png", np.where(RING, 255, DISC).astype(np.uint8))
    truth = read_truth(path, labels=labels)
    assert (truth.object == DISC).all()
    assert truth.void is not None
    assert (truth.void == RING).all()
    assert (read_mask(path, labels=(255,)) == RING).all()


@pytest.mark.parametrize("value", [127, 128])
def test_greys_that_end_at_white_have_no_void(value: int, tmp_path: Path) -> None:
    path = save(tmp_path / "m.png", np.where(DISC, 0, np.where(RING, value, 255)).astype(np.uint8))
    truth = read_truth(path, labels=(value,))
    assert (truth.object == RING).all()
    assert truth.void is None
    assert (read_mask(path, labels=(0,)) == DISC).all()


def test_labels_in_a_lossy_file(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"m\.jpg: the values up to [1-5] of a lossy mask are taken for black"):
        assert not read_mask(save(tmp_path / "m.jpg", CLASSES, quality=100)).any()


def test_two_values_are_a_mask(tmp_path: Path) -> None:
    for low, high in ((0, 255), (0, 1), (0, 7)):
        truth = read_truth(save(tmp_path / "m.png", np.where(DISC, high, low).astype(np.uint8)))
        assert (truth.object == DISC).all()
        assert truth.void is None


def test_the_colours_of_a_palette_are_labels(tmp_path: Path) -> None:
    image = PILImage.fromarray(CLASSES)
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    for name in ("m.png", "m.gif", "m.tif"):
        image.save(tmp_path / name, optimize=False)
        assert (read_mask(tmp_path / name, labels=(2,)) == RING).all()
    grey = PILImage.fromarray(DISC.astype(np.uint8))
    grey.putpalette([255, 255, 255, 0, 0, 0])
    grey.save(tmp_path / "inverted.png")
    assert (read_mask(tmp_path / "inverted.png") == ~DISC).all(), "grey values of a palette are values"


def test_masks_in_colours(tmp_path: Path) -> None:
    red = np.where(DISC[..., None], (255, 0, 0), (0, 0, 0)).astype(np.uint8)
    assert (read_mask(save(tmp_path / "m.png", red)) == DISC).all()
    assert (read_mask(save(tmp_path / "m.jpg", red)) != DISC).sum() <= 30
    both = np.where(RING[..., None], (0, 255, 0), red).astype(np.uint8)
    with pytest.raises(LabelNeeded, match=r"labels #00ff00, #ff0000; say which is the object: --label '#rrggbb'"):
        read_mask(save(tmp_path / "m.png", both))
    assert (read_mask(tmp_path / "m.png", labels=parse_labels(["#ff0000"])) == DISC).all()
    with pytest.raises(ValueError, match="expected a --label of the colours"):
        read_mask(tmp_path / "m.png", labels=(1,))
    on_white = np.where(DISC[..., None], (255, 0, 0), (255, 255, 255)).astype(np.uint8)
    for name in ("w.png", "w.jpg"):
        with pytest.raises(ValueError, match="expected a black background"):
            read_mask(save(tmp_path / name, on_white))


@pytest.mark.parametrize("opacity", [1, 100, 255])
@pytest.mark.parametrize("colour", ["black", "white", "red"])
def test_what_is_painted_on_nothing(opacity: int, colour: str, tmp_path: Path) -> None:
    image = PILImage.new("RGBA", DISC.shape[::-1], colour)
    image.putalpha(PILImage.fromarray((DISC * opacity).astype(np.uint8)))
    for name in ("m.png", "m.tif"):
        image.save(tmp_path / name)
        assert (read_mask(tmp_path / name) == DISC).all()


def test_colours_on_transparent_white(tmp_path: Path) -> None:
    colours = np.where(DISC[..., None], (255, 0, 0), np.where(RING[..., None], (0, 0, 255), (255, 255, 255)))
    rgba = np.dstack([colours, (DISC | RING) * 255]).astype(np.uint8)
    assert (read_mask(save(tmp_path / "m.png", rgba), labels=parse_labels(["#0000ff"])) == RING).all()


def test_gif_masks(tmp_path: Path) -> None:
    assert (read_mask(save(tmp_path / "m.gif", (DISC * 255).astype(np.uint8))) == DISC).all()


def test_volumes_with_labels(tmp_path: Path) -> None:
    volume = np.stack([CLASSES.T, (CLASSES * (CLASSES == 2)).T], axis=2)
    for name, dtype in (("m.nii.gz", np.uint8), ("f.nii", np.float32)):
        nibabel.save(nibabel.Nifti1Image(volume.astype(dtype), np.diag([-1, -1, 1, 1])), tmp_path / name)
        assert (read_mask(tmp_path / name, 0, labels=(1,)) == DISC).all()
        with pytest.raises(LabelNeeded, match="labels 1, 2"):
            read_mask(tmp_path / name, 0)
        assert (read_mask(tmp_path / name, 1) == RING).all()


def test_labels_of_the_command_line() -> None:
    assert parse_labels([]) is None
    assert parse_labels(["all"]) == ()
    assert parse_labels(["1", "#00ff10"]) == (1, 0x00FF10)
    with pytest.raises(ValueError, match="label: expected a number, a colour such as #ff0000, or all, got 'lesion'"):
        parse_labels(["1", "lesion"])


def test_labels_are_checked_before_anything_is_made(tmp_path: Path) -> None:
    image = data.save(tmp_path / "i.png", data.lesion(DISC))
    masks = [save(tmp_path / f"{i}.png", pixels) for i, pixels in enumerate((DISC.astype(np.uint8), CLASSES))]
    with pytest.raises(LabelNeeded, match=r"1\.png: holds the labels 1, 2"):
        check_labels([Case(mask.stem, image, mask) for mask in masks])
    check_labels([Case(mask.stem, image, mask, labels=(2,)) for mask in masks])
    with pytest.raises(ValueError, match=r"label: none of 1 masks has label 3: .*1\.png, which holds the labels 1, 2"):
        check_labels([Case("1", image, masks[1], labels=(3,))])
    lossy = save(tmp_path / "m.jpg", CLASSES * 100)
    with pytest.raises(ValueError, match=r"m\.jpg: expected labels, got the values of a lossy or soft mask"):
        check_labels([Case("1", image, lossy, labels=(1,))])
    check_labels([Case("gone", image, tmp_path / "gone.png")])
