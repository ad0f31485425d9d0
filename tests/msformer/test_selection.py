"""The rules that find the object in a label map without a mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from skimage.filters import threshold_otsu
from torch import Tensor

from msformer.io.base import apply_window
from msformer.io.prepare import prepare_image
from msformer.scoring import dice
from msformer.selection import FADING, REACH, RULES, body_mask, clean_up, grey_levels, select
from tests.msformer.evaluation.data import chest, disc, lesion, lungs

TRUTH = disc(64, 80, 16)


def skin(mask: NDArray[np.bool_] = TRUTH) -> Tensor:
    return prepare_image(lesion(mask))


@pytest.mark.parametrize("rule", ["central", "dark"])
def test_a_lesion_in_the_middle(rule: str) -> None:
    assert (select(rule, TRUTH.astype(int), skin()) == TRUTH).all()
    assert (select(rule, (~TRUTH).astype(np.uint8) * 7, skin()) == TRUTH).all(), "numbers of labels mean nothing"


@pytest.mark.parametrize("rule", ["central", "dark"])
def test_a_rim_with_the_label_of_the_lesion(rule: str) -> None:
    """As networks that pad with zeros give it: the frame must not make everything in it a filled hole."""
    truth = disc(128, 128, 30)
    labels = truth.astype(int)
    labels[0] = labels[-1] = labels[:, 0] = labels[:, -1] = 1
    assert (select(rule, labels, skin(truth)) == truth).all()


def test_dark_corners_with_the_label_of_the_lesion() -> None:
    truth, field = disc(128, 128, 30), disc(128, 128, 70)
    image = skin(truth | ~field)
    assert (select("dark", (truth | ~field).astype(int), image) == truth).all()


def test_a_dark_frame_around_the_field_with_the_label_of_the_lesion() -> None:
    """It closes around everything: what it encloses is no hole."""
    truth, field = disc(128, 128, 30), disc(128, 128, 56)
    image = skin(truth | ~field)
    for labels in ((truth | ~field).astype(int), truth + 2 * ~field):
        assert (select("dark", labels, image) == truth).all()


def hairs(size: int, width: float) -> NDArray[np.bool_]:
    """Lines all over a square image, that cross each other and reach its corners."""
    rows, columns = np.mgrid[:size, :size]
    spacing = size / 4
    ways = (rows - columns, rows + columns - size, rows - size / 3, columns - size / 3)
    return np.asarray(
        np.any([np.abs((way + spacing / 2) % spacing - spacing / 2) <= width / 2 for way in ways], axis=0)
    )


@pytest.mark.parametrize("size", [97, 129, 257])
def test_hairs_with_the_label_of_the_lesion(size: int) -> None:
    """They join the lesion with dark corners, and enclose skin that would be filled as holes."""
    truth = disc(size, size, 0.24 * size)
    labels = truth | hairs(size, 0.012 * size) | ~disc(size, size, 0.56 * size)
    found = select("dark", labels.astype(int), skin(labels))
    assert dice(found, truth) > 0.93
    assert not found[: size // 8].any()


def test_a_lesion_of_a_loose_texture_does_not_go_with_the_hairs() -> None:
    random = np.random.default_rng(0)
    truth = disc(128, 128, 32)
    labels = truth & (random.random(truth.shape) > 0.3)
    assert dice(select("dark", labels.astype(int), skin(labels)), truth) > 0.97


def test_hairs_alone_and_a_lesion_at_the_border() -> None:
    only = hairs(128, 1.2)
    assert select("dark", only.astype(int), skin(only)).any()
    half = np.zeros((128, 128), np.bool_)
    half[40:] = True
    assert (select("dark", half.astype(int), skin(half)) == half).all()


@pytest.mark.parametrize("radius", [12, 30])
def test_a_bright_object_on_dark_ground(radius: int) -> None:
    truth = disc(128, 128, radius)
    for labels in (truth.astype(int), truth + 2 * disc(128, 128, radius / 2)):
        assert (select("dark", labels, skin(~truth)) == truth).all()


def test_a_lesion_that_covers_most_of_the_border() -> None:
    truth = disc(128, 128, 80)
    assert dice(select("dark", truth.astype(int), skin(truth)), truth) > 0.99


def test_shaded_skin_around_the_field_is_no_lesion() -> None:
    """A little brighter than the threshold is the fading edge of a lesion in the middle, but shaded skin outside it."""
    rows, columns = np.mgrid[:128, :128] - 63.5
    lesion_, edge, lit = disc(128, 128, 24), disc(128, 128, 30), disc(128, 128, 56)
    grey = 245 - 80 * (rows**2 + columns**2) / 90**2
    grey[edge], grey[lesion_] = 205, 160
    image = prepare_image(np.stack([grey.astype(np.uint8)] * 3, axis=2))
    assert threshold_otsu(grey_levels(image)) < grey[edge & ~lesion_].mean() < FADING * threshold_otsu(grey)
    assert threshold_otsu(grey_levels(image)) < 204 < FADING * threshold_otsu(grey), "the shaded skin, too"
    for number, expected in ((2, lesion_), (3, edge)):  # edge and shaded skin with one label, and with two
        labels = np.where(lesion_, 1, np.where(edge, 2, np.where(lit, 0, number)))
        assert dice(select("dark", labels, image), expected) > 0.98


def test_shaded_skin_at_an_edge_with_the_label_of_the_lesion() -> None:
    """Together they lie around the middle; the lesion alone does not."""
    truth = disc(128, 128, 20)
    shaded = np.zeros((128, 128), dtype=bool)
    shaded[:36], shaded[:, 118:] = True, True
    dark_ = truth | shaded
    for rule in ("dark", "lesion"):
        assert dice(select(rule, dark_.astype(int), skin(dark_)), truth) > 0.98


def test_a_lesion_of_several_labels() -> None:
    labels = TRUTH.astype(int) + disc(64, 80, 8)
    for rule in ("central", "dark"):
        assert (select(rule, labels, skin()) == TRUTH).all()


def fading(radius: float, width: float, size: int = 128) -> Tensor:
    """A lesion whose border fades into the skin over a width."""
    rows, columns = np.mgrid[:size, :size] - (size - 1) / 2
    grey = 80 + 120 * np.clip((np.hypot(rows, columns) - radius) / max(width, 1e-9), 0, 1)
    return prepare_image(np.stack([grey.astype(np.uint8)] * 3, axis=2))


def test_the_fading_border_of_a_lesion_belongs_to_it() -> None:
    core = disc(128, 128, 30)
    image = fading(30, 6)
    found = select("lesion", core.astype(int), image)
    assert dice(found, disc(128, 128, 30 + 0.8 * 6)) > 0.98, "up to where a fifth of the contrast is left"
    assert (select("dark", core.astype(int), image) == core).all()
    for sharp in (skin(core), fading(30, 0)):
        assert dice(select("lesion", core.astype(int), sharp), core) > 0.99
    far = select("lesion", core.astype(int), fading(30, 20))
    assert far.sum() <= disc(128, 128, 31 + REACH * 128).sum(), "not farther than a lesion fades"


def test_a_dark_spot_beside_the_lesion_is_not_its_border() -> None:
    truth = disc(128, 128, 30)
    pixels = lesion(truth)
    pixels[64, 97:99] = 60
    found = select("lesion", truth.astype(int), prepare_image(pixels))
    assert (found == truth).all()


@pytest.mark.parametrize("radius", [12, 30, 200])
def test_a_lesion_of_any_size_and_a_bright_object(radius: int) -> None:
    """`lesion` is `dark` where the border is sharp, no skin is to be seen, or the object is bright."""
    truth = disc(128, 128, radius)
    for image in (skin(truth), skin(~truth)):
        labels = truth + 2 * disc(128, 128, radius / 2)
        assert (select("lesion", labels, image) == select("dark", labels, image)).all()


def test_specks_and_holes() -> None:
    labels = TRUTH.astype(int)
    labels[30:33, 38:41] = 0
    labels[4:7, 4:7] = 1
    for rule in ("central", "dark"):
        assert (select(rule, labels, skin()) == TRUTH).all()


def test_dark_finds_something_where_nothing_is_dark() -> None:
    image = torch.full((3, 64, 80), 0.5)
    assert select("dark", TRUTH.astype(int), image).any()


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("shape", [(33, 33), (33, 200), (257, 40)])
def test_every_rule_gives_a_mask_for_anything(rule: str, shape: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    for labels in (random.integers(0, 5, shape), np.arange(shape[0] * shape[1]).reshape(shape) // 500):
        for image in (torch.rand(3, *shape, generator=torch.Generator().manual_seed(0)), torch.zeros(3, *shape)):
            found = select(rule, labels, image)
            assert found.shape == shape
            assert found.dtype == np.bool_


@pytest.mark.parametrize("rule", sorted(RULES))
def test_one_label_is_everything(rule: str) -> None:
    assert select(rule, np.full((40, 40), 3), torch.rand(3, 40, 40)).all()


def test_unknown_rule() -> None:
    with pytest.raises(ValueError, match="select: unknown rule 'best'; expected one of central, dark, lesion, lung"):
        select("best", np.zeros((4, 4), int), torch.zeros(3, 4, 4))


def test_lung_is_not_the_air_outside() -> None:
    """With the table below, whose label is that of the body."""
    truth = lungs(128)
    values = chest(truth)
    values[122:124, 10:118] = 300
    image = prepare_image(apply_window(values, -512, 512))
    body = body_mask(image)
    assert dice(body, chest(np.zeros_like(truth)) > -500) > 0.98
    labels = (values > -500).astype(int)
    assert dice(select("lung", labels, image), truth) > 0.98
    labels[62:65, 40:43] = 1  # a vessel
    labels[50:80, 75:95] = 1  # and something large
    found = select("lung", labels, image)
    assert found[62:65, 40:43].all()
    assert not found[55:75, 80:90].any()


def test_clean_up_keeps_an_empty_mask_empty() -> None:
    assert not clean_up(np.zeros((40, 40), bool)).any()
    assert clean_up(np.ones((40, 40), bool)).all()
