"""Colours, overlays, indexed PNGs, contact sheets, synthetic images, scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from msformer.pictures import (
    SheetRow,
    borders,
    colour_labels,
    contact_sheet,
    drawable_borders,
    indexed_png,
    outline,
    overlay,
    palette,
    row_pictures,
)
from msformer.scoring import dice, oracle, oracle_union, score
from msformer.synthetic import synthetic_lesion

LABELS = np.array([[0, 0, 1], [0, 2, 1]])


def test_colours_are_stable_and_distinct() -> None:
    assert palette(3).tolist() == [[0x56, 0xB4, 0xE9], [0xD5, 0x5E, 0x00], [0x00, 0x9E, 0x73]]
    assert np.array_equal(palette(300)[:40], palette(40))
    assert len({tuple(colour) for colour in palette(300).tolist()}) == 300
    steps = np.abs(np.diff(palette(300).astype(int), axis=0)).sum(1)
    assert steps.min() > 60, "neighbouring labels must be told apart"


def test_borders_and_overlay() -> None:
    assert borders(LABELS).tolist() == [[False, True, False], [True, True, False]]
    image = np.full((2, 3, 3), 100, dtype=np.uint8)
    drawn = overlay(image, LABELS, strength=0.5)
    assert (drawn[borders(LABELS)] == 255).all()
    assert drawn[0, 0].tolist() == ((image[0, 0] + palette(1)[0].astype(float)) / 2).round().tolist()
    outlined = outline(image, LABELS == 0)
    changed = (outlined != image).any(-1)
    assert np.array_equal(changed, borders(LABELS == 0, 2))
    assert (image == 100).all(), "the image itself stays as it is"


@pytest.mark.parametrize("count", [3, 256, 257, 40000])
def test_indexed_png_holds_the_labels(count: int, tmp_path: Path) -> None:
    labels = np.arange(count).reshape(1, -1)
    indexed_png(labels).save(tmp_path / "a.png")
    with PILImage.open(tmp_path / "a.png") as image:
        assert image.mode == ("P" if count <= 256 else "I;16")
        assert np.array_equal(np.asarray(image), labels)
        if count == 3:
            assert np.array_equal(np.asarray(image.convert("RGB")), colour_labels(labels))


def test_too_many_labels_for_a_png() -> None:
    with pytest.raises(ValueError, match="65537 are too many"):
        indexed_png(np.array([[65536]]))


def test_contact_sheet(tmp_path: Path) -> None:
    rows = []
    for height, width in ((30, 40), (60, 20)):
        labels = np.arange(height * width).reshape(height, width) % 5
        image = np.zeros((height, width, 3), dtype=np.uint8)
        rows.append(SheetRow("name", "5 labels", image, labels, labels == 1 if height == 30 else None))
    contact_sheet(rows, tmp_path / "sheet.png")
    with PILImage.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 800
        assert len(sheet.convert("RGB").getcolors(1 << 20)) > 10


def test_a_mask_that_was_found_is_drawn_within_the_true_border() -> None:
    image, labels = np.full((40, 40, 3), 100, dtype=np.uint8), np.zeros((40, 40), dtype=np.uint8)
    truth, found = (np.arange(40) < end for end in (20, 30))
    truth, found = np.tile(truth, (40, 1)), np.tile(found, (40, 1))
    row = SheetRow("name", "1 label", image, labels, truth, found)
    first, middle, _ = row_pictures(row)
    line = (0, 255, 120)
    assert (first[:, 19] == line).all()
    assert (first[:, [10, 25, 35]] == 100).all()
    assert (middle[:, 19] == line).all()
    assert (middle[:, [10, 25]] == 100).all()
    assert (middle[:, 35] == 33).all(), "not found, and darkened"
    assert not (row_pictures(replace(row, found=None))[1][:, 19] == line).all(), (
        "an overlay of labels has no true border"
    )


def test_synthetic_images_follow_from_the_seed() -> None:
    first, again, other = synthetic_lesion(3), synthetic_lesion(3), synthetic_lesion(4)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.mask, again.mask)
    assert not np.array_equal(first.image, other.image)
    assert synthetic_lesion(0, 100, 80).image.shape == (100, 80, 3)
    with pytest.raises(ValueError, match="expected at least 64 each, got 63 and 80"):
        synthetic_lesion(0, 63, 80)


@pytest.mark.parametrize("seed", range(8))
def test_synthetic_lesions_are_dark_and_of_sensible_size(seed: int) -> None:
    image, mask = synthetic_lesion(seed)
    assert 0.04 < mask.mean() < 0.5
    assert image[mask].mean() < image[~mask].mean() - 25


def test_scores_by_hand() -> None:
    truth = np.array([[True, True, False, False]])
    labels = np.array([[0, 1, 1, 2]])
    assert dice(labels == 0, truth) == pytest.approx(2 / 3)
    assert oracle(labels, truth).tolist() == [[True, False, False, False]]
    assert oracle_union(labels, truth).tolist() == [[True, False, False, False]]
    assert score(labels, truth) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    empty = np.zeros_like(truth)
    assert dice(empty, empty) == 1
    assert score(labels, empty) == (0, 1, 0)


def test_scores_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"truth: has shape \(1, 3\), the label map \(2, 3\)"):
        score(LABELS, np.ones((1, 3), dtype=bool))
    with pytest.raises(ValueError, match="truth: expected a boolean mask, got int64"):
        score(LABELS, np.ones((2, 3), dtype=np.int64))


def test_overlay_draws_no_lines_inside_fine_textures() -> None:
    labels = np.zeros((60, 60), dtype=np.uint8)
    labels[:, 30:] = 1
    labels[:, 30::2] = 2
    lines = drawable_borders(labels, 1)
    assert borders(labels)[:, 40:55].all()
    assert not lines[:, 40:55].any()
    assert lines[10:50, 24:30].any(axis=1).all(), "the border of the texture itself stays"
