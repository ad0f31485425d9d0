"""Measures, protocols and intervals against values worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from msformer.baselines import Method, all_methods, otsu
from msformer.evaluation.layouts import Case
from msformer.evaluation.measures import OwnSize, measure, speckle
from msformer.evaluation.pairs import Pair
from msformer.evaluation.protocols import PROTOCOLS, predictions, published
from msformer.evaluation.run import score
from msformer.evaluation.store import Fitted
from msformer.evaluation.summary import cell, header, mean_and_interval, summarise, table_rows
from msformer.io.prepare import resize_labels
from msformer.scoring import dice
from tests.msformer.evaluation.data import disc

EMPTY, FULL = np.zeros((6, 8), bool), np.ones((6, 8), bool)


def test_measures() -> None:
    truth, predicted = EMPTY.copy(), EMPTY.copy()
    truth[1:3, 1:5] = True  # 8 pixels
    predicted[2:4, 1:5] = True  # 8 pixels, 4 of them true
    found = measure(predicted, truth)
    assert found.dsc == 0.5
    assert found.jaccard == 4 / 12
    assert found.hm == 8 / 12
    assert found.xor == 1.0
    assert found.precision == found.recall == 0.5
    assert found.hd95 == 1.0


def test_the_published_measures_are_ordered() -> None:
    """HM <= XOR and HM <= 1, which the published tables break."""
    random = np.random.default_rng(0)
    for _ in range(20):
        found = measure(random.random((9, 9)) > 0.6, random.random((9, 9)) > 0.8)
        assert found.xor is not None
        assert found.hm <= min(1, found.xor)


def test_empty_masks_are_never_a_division_by_zero() -> None:
    assert measure(EMPTY, EMPTY) == (1.0, 0.0, None, 1.0, None, None, None)
    assert measure(FULL, EMPTY) == (0.0, 1.0, None, 0.0, 0.0, None, None)
    assert measure(EMPTY, FULL) == (0.0, 1.0, 1.0, 0.0, None, 0.0, None)
    assert measure(FULL, FULL) == (1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0)


def test_border_distance_is_that_of_the_worse_direction() -> None:
    """A second square, far on the right, is far from the first, but not the first from both."""
    truth = np.zeros((40, 60), bool)
    truth[5:25, 5:25] = True
    both = truth | np.roll(truth, 30, axis=1)
    # 20 of the 152 pixels of the borders of both, those of the right edge, are 30 away, no other is farther
    assert measure(both, truth).hd95 == measure(truth, both).hd95 == 30.0


def test_border_distance_leaves_the_farthest_twentieth_out() -> None:
    truth = np.zeros((40, 60), bool)
    truth[5:25, 5:25] = True
    speck = truth.copy()
    speck[15, 50] = True  # 1 of 77 pixels of the border
    assert measure(speck, truth).hd95 == measure(truth, speck).hd95 == 0.0


def test_different_sizes() -> None:
    with pytest.raises(ValueError, match=r"truth: has shape \(3, 3\), the prediction \(6, 8\)"):
        measure(EMPTY, np.zeros((3, 3), bool))


def test_speckle() -> None:
    rows, columns = np.mgrid[:9, :12]
    assert speckle((rows + columns) % 2) == 1
    assert speckle(2 * (rows % 2) + columns % 2) == 1, "four labels that repeat every two pixels"
    assert speckle(columns % 2) == 1, "stripes"
    assert speckle(columns // 2 % 2) == 0
    assert speckle(columns // 6) == 0
    half = np.where(rows < 5, (rows + columns) % 2, 2)
    assert speckle(half) == 4 / 7
    for shape in ((1, 5), (2, 2), (1, 1)):
        assert speckle(np.zeros(shape, int)) == 0


def test_protocols() -> None:
    truth = disc(40, 48, 9)
    labels = np.zeros((40, 48), np.uint8)
    labels[truth] = 1
    labels[:20][truth[:20]] = 2  # the upper half of the object has a label of its own
    labels[0, 0] = 1
    found = predictions(labels, truth, blind=labels == 2)
    assert tuple(found) == PROTOCOLS
    assert (found["blind"] == (labels == 2)).all()
    assert (found["oracle"] == (labels == (1 if (labels[truth] == 1).sum() > truth.sum() / 2 else 2))).all()
    assert (found["oracle-union"] == (labels > 0)).all()
    assert not found["published"][0, 0], "outside the gate"


def test_the_gate_is_the_mask_dilated_by_six_pixels_each_way() -> None:
    truth = np.zeros((40, 40), bool)
    truth[18:20, 18:20] = True
    everything = published(np.zeros((40, 40), int), truth)
    assert everything.sum() == 14 * 14
    assert (everything == ndimage.binary_dilation(truth, np.ones((3, 3)), iterations=6)).all()


def test_protocols_of_an_empty_and_a_full_mask() -> None:
    labels = np.arange(48).reshape(6, 8) % 3
    assert not published(labels, EMPTY).any()
    for truth in (EMPTY, FULL):
        for predicted in predictions(labels, truth, blind=labels == 0).values():
            assert predicted.shape == truth.shape
    assert predictions(labels, FULL, labels == 0)["oracle-union"].all()


def test_intervals() -> None:
    mean, low, high = mean_and_interval(np.arange(100.0))
    assert mean == 49.5
    spread = 1.96 * np.arange(100.0).std() / 10
    assert (low, high) == (pytest.approx(49.5 - spread, abs=0.6), pytest.approx(49.5 + spread, abs=0.6))
    assert mean_and_interval(np.array([0.3, 0.3])) == (0.3, 0.3, 0.3)
    one = mean_and_interval(np.array([0.3]))
    assert one[0] == 0.3
    assert np.isnan(one[1:]).all()
    assert np.isnan(mean_and_interval(np.array([]))).all()
    assert mean_and_interval(np.arange(9.0)) == mean_and_interval(np.arange(9.0)), "the same in every run"


@pytest.mark.parametrize("size", [(40, 48), (7, 9), (40, 100), (13, 1), (300, 301)])
def test_dice_at_the_own_size_is_that_of_the_resized_mask(size: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    for truth in (disc(53, 61, 17), np.zeros((53, 61), bool), np.ones((53, 61), bool)):
        own_size = OwnSize(truth, size)
        for predicted in (random.random(size) > 0.4, np.zeros(size, bool), np.ones(size, bool)):
            assert own_size.dice(predicted) == dice(resize_labels(predicted, truth.shape), truth)


def test_methods_are_compared_with_the_last_image_by_image() -> None:
    """An image that one of the two has no score for does not count."""
    methods = [Method(name, name.title(), order, otsu.label_map) for order, name in enumerate(("one", "two", "three"))]
    dice_of = {"one": [0.5, 0.6, 0.9, 0.1], "two": [0.7, 0.9, 0.8, None]}
    rest = {"hm": 0, "xor": 0, "jaccard": 0, "precision": 0, "recall": 0, "hd95": 2, "dsc_full": 0}
    rest |= {"empty_truth": False, "empty_prediction": False, "labels": 2, "speckle": 0.25, "steps": 1, "seconds": 1.0}
    rows = [
        {"image": str(image), "method": name, "protocol": protocol, **rest, "dsc": value}
        for name, values in dice_of.items()
        for image, value in enumerate(values)
        for protocol in PROTOCOLS
    ]
    summary = summarise(rows[::-1], methods[:2])
    first = summary.iloc[0]
    assert first.difference == pytest.approx((-0.2 - 0.3 + 0.1) / 3)
    assert first.difference_low == pytest.approx(-0.3)
    assert first.difference_high == pytest.approx(0.1)
    assert cell(first, "difference") == "-13.3 [-30.0, +10.0] (without 1)"
    line = dict(zip(header(summary), table_rows(summary, "blind")[0], strict=True))
    assert line["less Two"] == "-13.3 [-30.0, +10.0] (without 1)"
    assert line["HD95, px"] == "2.0 [2.0, 2.0]"
    assert line["speckle"] == "25.0"
    assert dict(zip(header(summary), table_rows(summary, "blind")[1], strict=True))["less Two"] == ""


def test_a_method_that_failed_on_images_says_so() -> None:
    methods = [Method(name, name.title(), order, otsu.label_map) for order, name in enumerate(("one", "two", "three"))]
    rest = dict.fromkeys(("hm", "xor", "jaccard", "precision", "recall", "hd95", "dsc_full"), 0.5)
    rest |= {"empty_truth": False, "empty_prediction": False, "labels": 2, "speckle": 0.0, "steps": 1, "seconds": 1.0}
    rows = [
        {"image": image, "method": name, "protocol": protocol, **rest, "dsc": 0.75}
        for name, images in (("one", "abcd"), ("two", "b"))
        for image in images
        for protocol in PROTOCOLS
    ]
    summary = summarise(rows, methods)
    assert (summary.images == 4).all()
    lines = {line[0]: line[1:] for line in table_rows(summary, "oracle")}
    assert lines["One"][0] == "75.0 [75.0, 75.0]"
    assert lines["Two"][0] == "75.0 (without 3)"
    assert lines["Three"] == ["-", "", *["-"] * 7, "0", "-", "-", "-"]


def test_void_pixels_count_for_no_score(tmp_path: Path) -> None:
    """Whatever the map says there."""
    truth = disc(40, 40)
    void = np.zeros_like(truth)
    void[:12] = True
    image = torch.rand(3, 40, 40, generator=torch.manual_seed(0))
    maps = [np.where(void, other, truth).astype(np.uint8) for other in (0, 1)]
    method = next(method for method in all_methods() if method.name == "otsu")
    found = []
    for labels in maps:
        pair = Pair(image, truth & ~void, True, void)
        fitted = Fitted(labels, 0, 0.0, mask=labels > 0)
        found.append(score(Case("a", tmp_path, tmp_path), pair, method, fitted, "dark"))
    for row, other in zip(*found, strict=True):
        assert row["dsc"] == other["dsc"] == row["dsc_full"] == other["dsc_full"] == 1.0
        assert row["xor"] == other["xor"] == 0.0
