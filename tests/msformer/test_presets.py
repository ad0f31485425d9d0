"""Presets of `segment`: what they say, what overrides them, margin and standardised channels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import msformer
from msformer.presets import DEFAULT, PRESETS, PUBLISHED, SMOOTH, LossWeights, find_preset
from msformer.segmentation import framed
from tests.msformer.conftest import QUICK

Picture = NDArray[np.uint8]


def test_the_published_one() -> None:
    assert PRESETS["published"] is PUBLISHED
    assert (PUBLISHED.size, PUBLISHED.max_steps, PUBLISHED.min_labels) == (257, 50, 3)
    assert PUBLISHED.weights == LossWeights(1, 1.5, 1.3)
    assert (PUBLISHED.embed_dim, PUBLISHED.num_clusters, PUBLISHED.depth, PUBLISHED.num_heads) == (100, None, 2, 1)
    assert (PUBLISHED.learning_rate, PUBLISHED.momentum) == (0.1, 0.9)
    assert (PUBLISHED.margin, PUBLISHED.icnr, PUBLISHED.standardise) == (0, False, False)


def test_what_is_given_overrides() -> None:
    assert find_preset("published") == PUBLISHED
    assert find_preset("published", depth=1, margin=None) == replace(PUBLISHED, depth=1)
    with pytest.raises(ValueError, match=r"preset: unknown .best.; expected one of .*published"):
        find_preset("best")


@pytest.mark.parametrize("name", list(PRESETS))
def test_segment_takes_a_preset(name: str, picture: Picture) -> None:
    preset = PRESETS[name]
    by_name = msformer.segment(picture, preset=name, **QUICK)
    explicit = {key: value for key, value in vars(preset).items() if key not in QUICK}
    other = next(other for other in (*PRESETS, name) if len(PRESETS) == 1 or other != name)
    assert msformer.segment(picture, preset=other, **explicit, **QUICK).losses == by_name.losses
    if name == DEFAULT:
        assert msformer.segment(picture, **QUICK).losses == by_name.losses


def test_the_default_is_the_published_one_with_icnr_and_margin(picture: Picture) -> None:
    assert PRESETS[DEFAULT] is SMOOTH
    assert replace(PUBLISHED, icnr=True, margin=8) == SMOOTH
    smooth, published, without = (
        msformer.segment(picture, **(QUICK | change))
        for change in ({}, {"preset": "published"}, {"preset": "smooth", "icnr": False, "margin": 0})
    )
    assert without.losses == published.losses
    assert smooth.losses != published.losses


def test_size_of_the_image_itself(picture: Picture) -> None:
    assert msformer.segment(picture, **(QUICK | {"size": None})).labels.shape == (48, 40)


@pytest.mark.parametrize("margin", [0, 1, 5])
def test_margin_is_mirrored_and_taken_off(margin: int, picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.rand(3, 33, 40)
    framed_image = framed(image, replace(PUBLISHED, margin=margin))
    assert framed_image.shape == (1, 3, 33 + 2 * margin, 40 + 2 * margin)
    expected = np.pad(image.numpy(), [(0, 0), (margin, margin), (margin, margin)], mode="reflect")
    assert (framed_image[0].numpy() == expected).all()

    seen: list[Any] = []

    def label_map(model: Any, fitted: Any) -> NDArray[np.int64]:
        height, width = fitted.shape[2:]
        seen.append(np.arange(height)[:, None] * 1000 + np.arange(width))
        return np.asarray(seen[-1] // 2, dtype=np.int64)  # no two of them alike but for neighbours

    monkeypatch.setattr("msformer.segmentation.label_map", label_map)
    labels = msformer.segment(picture, **(QUICK | {"margin": margin, "max_steps": 1})).labels
    assert labels.shape == (33, 33)
    inner = (seen[0] // 2)[margin : 33 + margin, margin : 33 + margin]
    _, first = np.unique(labels, return_index=True)
    assert len(first) == len(np.unique(inner)), "the middle of the fitted map"
    assert ((labels[:, 1:] == labels[:, :-1]) == (inner[:, 1:] == inner[:, :-1])).all()


def test_standardised_channels() -> None:
    image = torch.rand(3, 40, 50) * torch.tensor([0.1, 0.5, 1.0])[:, None, None]
    image[0] = 0.25
    found = framed(image, replace(PUBLISHED, standardise=True))[0]
    assert not found[0].any(), "a constant channel has nothing to be scaled"
    assert found[1:].mean((1, 2)).abs().max() < 1e-5
    assert (found[1:].std((1, 2), correction=0) - 1).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"margin": -1}, "margin: expected at least 0, got -1"),
        ({"margin": 33}, "margin: expected less than the image's 33 pixels, got 33"),
        ({"preset": "best"}, "preset: unknown 'best'"),
        ({"size": "large"}, "size: expected a number of pixels"),
    ],
)
def test_errors(settings: dict[str, Any], message: str, picture: Picture) -> None:
    with pytest.raises(ValueError, match=message):
        msformer.segment(picture, **(QUICK | settings))
