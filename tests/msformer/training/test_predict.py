"""What a trained network says of an image: sizes, mirror images, fusion with rules, clusters."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from msformer.io.base import apply_window
from msformer.io.prepare import prepare_image
from msformer.scoring import dice
from msformer.training import predict as module
from msformer.training.predict import confidence, fused, predict, probabilities
from msformer.training.teachers import TEACHER_SIZE, Teachers
from tests.msformer.evaluation.data import chest, disc, lesion, lungs
from tests.msformer.training.data import dark_model, dark_network

TRUTH = disc(120, 140, 32)
IMAGE = prepare_image(lesion(TRUTH))


def test_the_object_at_the_size_of_the_image(tmp_path: Path) -> None:
    found = predict(dark_model(tmp_path), IMAGE)
    assert found.probability.shape == found.labels.shape == found.mask.shape == TRUTH.shape
    assert (found.probability.dtype, found.mask.dtype) == (np.float32, np.bool_)
    assert found.probability.min() >= 0
    assert found.probability.max() <= 1
    assert dice(found.mask, TRUTH) > 0.96
    assert ((found.probability > 0.5) == (found.labels == 1)).all()
    assert found.confidence > 0.75
    assert found.decided_by == "fused"


def test_light_and_contrast_do_not_matter(tmp_path: Path) -> None:
    model = dark_model(tmp_path)
    bright, dim = predict(model, IMAGE), predict(model, 0.1 + 0.3 * IMAGE)
    np.testing.assert_allclose(bright.probability, dim.probability, atol=1e-3)


def test_mirror_images_are_answered_alike() -> None:
    """Also by a network that tells left from right and top from bottom."""
    torch.manual_seed(1)
    network = dark_network()
    torch.nn.init.normal_(network.patch_embed_s.proj.weight)
    image = torch.randn(2, 3, 40, 44)
    shares = probabilities(network, image)
    assert shares.shape == (2, 2, 40, 44)
    torch.testing.assert_close(shares.sum(1), torch.ones(2, 40, 44))
    for sides in ([2], [3], [2, 3]):
        torch.testing.assert_close(probabilities(network, image.flip(sides)), shares.flip(sides), rtol=0, atol=1e-5)
    torch.testing.assert_close(probabilities(network, image[1:])[0], shares[1], rtol=0, atol=1e-5)


def test_confidence() -> None:
    p = np.zeros((10, 10), np.float32)
    assert confidence(p) == 0
    p[:5] = 1
    assert confidence(p) == 1
    p[:5] = 0.9
    assert confidence(p) == pytest.approx(0.8)
    p[5:] = 0.4
    assert confidence(p) == 0


def test_rules_help_a_net_that_is_not_sure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unsure = dark_model(tmp_path, sharpness=0.5, shift=-0.5)
    net, fused = predict(unsure, IMAGE, gate="net"), predict(unsure, IMAGE)
    assert (net.decided_by, fused.decided_by) == ("net", "fused")
    np.testing.assert_array_equal(fused.probability, net.probability)
    assert dice(fused.mask, TRUTH) > dice(net.mask, TRUTH) + 0.01
    monkeypatch.setattr(module, "rule_masks", None)
    assert predict(unsure, IMAGE, gate="net").decided_by == "net", "no rule is asked"


def test_a_net_that_is_sure_overrules_rules_that_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Teachers(np.zeros((6, TEACHER_SIZE, TEACHER_SIZE), np.bool_), ())
    monkeypatch.setattr(module, "rule_masks", lambda image, domain: wrong)
    sure, unsure = dark_model(tmp_path / "sure"), dark_model(tmp_path / "unsure", sharpness=0.5)
    assert dice(predict(sure, IMAGE).mask, TRUTH) > 0.95
    assert not predict(unsure, IMAGE).mask.any()


def test_a_net_counts_as_much_as_it_is_sure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the image as a whole: pixels that it is sure of do not overrule the rules where it is unsure of the rest."""
    wrong = Teachers(np.zeros((6, TEACHER_SIZE, TEACHER_SIZE), np.bool_), ())
    monkeypatch.setattr(module, "rule_masks", lambda image, domain: wrong)
    model = dark_model(tmp_path)
    assert predict(model, IMAGE).mask.any()
    monkeypatch.setattr(module, "confidence", lambda probability: 0.1)
    assert not predict(model, IMAGE).mask.any()


def odds(probability: NDArray[np.float32]) -> NDArray[np.float32]:
    return probability / (1 - probability)


def test_fusing() -> None:
    """Odds multiply, and Laplace's rule of succession says how likely one more rule would see the object."""
    share, p = np.array([0, 1 / 3, 1], np.float32), np.array([0.9, 0.9, 0.3], np.float32)
    rules = np.array([0.2, 0.4, 0.8], np.float32)
    np.testing.assert_allclose(odds(fused(p, share, 1)), odds(p) * odds(rules), rtol=1e-5)
    np.testing.assert_allclose(odds(fused(p, share, 0.5)), odds(p) ** 0.5 * odds(rules), rtol=1e-5)
    np.testing.assert_allclose(odds(fused(p, share, 1, votes=6)[2:]), odds(p)[2:] * 7, rtol=1e-5)
    limits = np.array([0.8, 0.6, 0.2], np.float32)
    assert (fused(limits + 0.01, share, 1) > 0.5).all()
    assert not (fused(limits - 0.01, share, 1) > 0.5).any()
    certain = fused(np.array([1, 0, 1], np.float32), share, 0)
    np.testing.assert_allclose(certain, rules, rtol=1e-6)
    assert certain.dtype == np.float32
    np.testing.assert_array_equal(fused(np.array([1, 1, 0], np.float32), share, 0.9) > 0.5, [True, True, False])


def test_votes_are_fused_like_masks_of_rules(tmp_path: Path) -> None:
    unsure = dark_model(tmp_path, sharpness=0.01)
    other = disc(60, 70, 25)
    few, many = (predict(unsure, IMAGE, gate="fused", votes=[other] * count).mask for count in (1, 20))
    assert dice(few, TRUTH) > 0.95
    assert dice(many, np.kron(other, np.ones((2, 2), np.bool_))) > 0.95


def test_specks_are_left_out_and_holes_filled(tmp_path: Path) -> None:
    pixels = lesion(TRUTH)
    pixels[4:12, 4:12] = pixels[60, 70]
    pixels[56:62, 66:72] = pixels[0, 139]
    found = predict(dark_model(tmp_path), prepare_image(pixels), gate="net")
    assert found.labels[8, 8] == 1
    assert found.labels[59, 69] == 0
    assert not found.mask[8, 8]
    assert found.mask[59, 69]
    assert dice(found.mask, TRUTH) > 0.96


def test_holes_in_lungs_stay(tmp_path: Path) -> None:
    truth = lungs(128)
    truth[50:74, 30:50] = False
    image = prepare_image(chest(truth))
    masks = {}
    for domain in ("ct", "generic"):
        masks[domain] = predict(dark_model(tmp_path, domain=domain), image, gate="net").mask
    assert not masks["ct"][60, 40]
    assert masks["generic"][60, 40]


def test_clusters_are_chosen_by_the_rule_of_the_domain(tmp_path: Path) -> None:
    model = dark_model(tmp_path, objective="consistency")
    found = predict(model, IMAGE)
    assert found.decided_by == "rule"
    assert set(np.unique(found.labels)) <= {0, 1, 2}
    assert dice(found.labels == 1, TRUTH) > 0.95, "labels keep their numbers"
    assert dice(found.mask, TRUTH) > 0.95
    assert dice(found.probability > 0.5, TRUTH) > 0.95
    bright = predict(model, 1 - IMAGE, rule="central")
    assert dice(bright.mask, TRUTH) > 0.9
    assert dice(bright.labels != 1, TRUTH) > 0.9


def test_any_image(tmp_path: Path) -> None:
    model = dark_model(tmp_path)
    path = tmp_path / "a.png"
    from PIL import Image

    Image.fromarray(lesion(TRUTH)).save(path)
    np.testing.assert_array_equal(model.predict(path).mask, predict(model, IMAGE).mask)
    framed = model.predict(lesion(TRUTH)[..., 0], window=(0, 128)).labels
    shown = model.predict(apply_window(lesion(TRUTH)[..., 0], 0, 128)).labels
    np.testing.assert_array_equal(framed, shown)
    net = model.predict(lesion(TRUTH), gate="net")
    np.testing.assert_array_equal(net.mask, predict(model, IMAGE, gate="net").mask)
    for image in (torch.zeros(3, 1, 1), torch.full((3, 50, 300), 0.4)):
        assert predict(model, image).mask.shape == image.shape[1:]


def test_several_threads(tmp_path: Path) -> None:
    model = dark_model(tmp_path, sharpness=0.5)
    images = [IMAGE.roll(shift, 2) for shift in (0, 10, 20, 30)]
    alone = [predict(model, image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda image: predict(model, image), images))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.mask, other.mask)


def test_errors(tmp_path: Path) -> None:
    model = dark_model(tmp_path)
    with pytest.raises(ValueError, match=r"image: expected \[3, H, W\], got \(1, 3, 40, 40\)"):
        predict(model, torch.zeros(1, 3, 40, 40))
    with pytest.raises(ValueError, match="gate: unknown 'maybe'; expected fused or net"):
        predict(model, IMAGE, gate="maybe")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown rule 'best'"):
        predict(model, IMAGE, rule="best")
