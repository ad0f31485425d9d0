"""`segment`: results, determinism, stop rule, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage

import msformer
import msformer_kernels
from msformer.io.read import Reading, read_image
from msformer.segmentation import order_by_area
from tests.msformer.conftest import FAST_BACKENDS, QUICK

Picture = NDArray[np.uint8]


def test_result(picture: Picture) -> None:
    seen: list[tuple[int, int, float]] = []
    result = msformer.segment(picture, **QUICK, progress=lambda *step: seen.append(step))
    assert result.labels.shape == (33, 33)
    assert result.labels_full.shape == (48, 40)
    assert result.num_labels == len(np.unique(result.labels))
    assert result.steps == len(result.losses) == len(result.label_counts) == 3
    assert not result.settled
    assert seen == [(i + 1, n, v) for i, (n, v) in enumerate(zip(result.label_counts, result.losses, strict=True))]
    assert result.backend == msformer_kernels.explain().chosen
    assert result.seconds > 0
    areas = np.bincount(result.labels.flatten())
    assert (np.diff(areas) <= 0).all(), "labels are numbered by falling area"


def test_same_seed_same_bits_other_seed_other_map(picture: Picture) -> None:
    first, second = (msformer.segment(picture, **QUICK, seed=3) for _ in range(2))
    assert np.array_equal(first.labels, second.labels)
    assert first.losses == second.losses
    assert msformer.segment(picture, **QUICK, seed=4).losses != first.losses


def test_global_random_state_is_left_alone(picture: Picture) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    msformer.segment(picture, **QUICK)
    assert torch.equal(torch.rand(3), expected)


def test_stops_when_few_labels_are_left(picture: Picture) -> None:
    result = msformer.segment(picture, **QUICK, min_labels=6)
    assert result.settled
    assert result.steps == 1


def test_every_kind_of_image_gives_the_same_map(picture: Picture, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    PILImage.fromarray(picture).save(path)
    tensor = torch.from_numpy(picture).permute(2, 0, 1)
    kinds: list[Any] = [picture, path, str(path), PILImage.fromarray(picture), tensor]
    losses = [msformer.segment(kind, **QUICK).losses for kind in kinds]
    assert all(found == losses[0] for found in losses)


def test_backends_agree(picture: Picture) -> None:
    found = [msformer.segment(picture, **QUICK, backend=name).losses for name in FAST_BACKENDS]
    for losses in found:
        assert losses == pytest.approx(found[0], rel=1e-3)


def test_sizes(picture: Picture) -> None:
    options = QUICK | {"size": (40, 33)}
    assert msformer.segment(picture, **options).labels.shape == (40, 33)
    assert msformer.segment(picture, **(QUICK | {"size": None})).labels.shape == (48, 40)


def test_a_constant_image_is_segmented(picture: Picture) -> None:
    result = msformer.segment(np.full((40, 40), 7, dtype=np.uint16), **QUICK)
    assert result.labels.shape == (33, 33)


def test_labels_are_ordered_by_area_in_the_smallest_type() -> None:
    labels = np.array([[9, 9, 2], [9, 4, 4]])
    assert order_by_area(labels).tolist() == [[0, 0, 2], [0, 1, 1]]
    assert order_by_area(np.arange(300).reshape(1, -1)).dtype == np.uint16
    assert order_by_area(labels).dtype == np.uint8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 32}, "size: 32 x 32 pixels are too small, expected at least 33"),
        ({"size": (33, 20)}, "size: 33 x 20 pixels are too small"),
        ({"max_steps": 0}, "max_steps: expected at least 1, got 0"),
        ({"min_labels": 0}, "min_labels: expected at least 1, got 0"),
        ({"learning_rate": 0}, "learning_rate: expected a positive number, got 0"),
        ({"momentum": 1.0}, "momentum: expected a number in"),
        ({"backend": "tpu"}, "unknown backend 'tpu'"),
        ({"device": "warp"}, "device: 'warp' cannot be used"),
    ],
)
def test_bad_settings(picture: Picture, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        msformer.segment(picture, **(QUICK | change))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((40, 40), np.nan), "image: holds NaN or infinite values"),
        (np.full((40, 40), np.inf), "image: holds NaN or infinite values"),
        (np.zeros((4, 40, 40, 3)), "expected a grey or colour image"),
        (np.zeros((0, 40)), "image: has no pixels"),
        (np.zeros((40, 40), dtype=np.complex64), "expected integer or floating-point pixels, got complex64"),
        (torch.zeros(40, 40), r"expected a tensor \[1 or 3, H, W\]"),
        (17, "expected a path, array, tensor or PIL image, got int"),
    ],
)
def test_bad_images(image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        msformer.segment(image, **QUICK)


def test_an_image_too_small_to_keep_its_size() -> None:
    with pytest.raises(ValueError, match="image: 20 x 50 pixels are too small"):
        msformer.segment(np.zeros((20, 50), dtype=np.uint8), **(QUICK | {"size": None}))


def test_a_loss_that_is_not_finite_is_an_error(picture: Picture) -> None:
    with pytest.raises(FloatingPointError, match=r"the loss became .* try a smaller learning rate"):
        msformer.segment(picture, **(QUICK | {"max_steps": 30, "min_labels": 1}), learning_rate=1e30)


def test_ctrl_c_passes_through(picture: Picture) -> None:
    def interrupt(step: int, labels: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        msformer.segment(picture, **QUICK, progress=interrupt)
    assert msformer_kernels.explain().rule == "the fastest for the device"


def test_a_file_is_read_as_asked(tmp_path: Path) -> None:
    """As with --window, --slice and --modality on the command line."""
    volume = np.random.default_rng(0).integers(-1000, 1000, (40, 44, 3)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "a.nii.gz")
    options: list[dict[str, Any]] = [{"slice_index": 2, "modality": "CT"}, {"slice_index": 2, "window": (-512, 512)}]
    expected = read_image(tmp_path / "a.nii.gz", Reading((-512, 512), 2))
    found = [msformer.segment(tmp_path / "a.nii.gz", **QUICK, **each).losses for each in options]
    assert found == [msformer.segment(expected, **QUICK).losses] * 2
    with pytest.raises(ValueError, match="expected a slice index from 0 to 2, got 3"):
        msformer.segment(tmp_path / "a.nii.gz", **QUICK, slice_index=3)
    with pytest.raises(ValueError, match="window: expected two numbers, the lower first"):
        msformer.segment(expected, **QUICK, window=(1, 1))
