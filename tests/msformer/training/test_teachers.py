"""Teachers, hairs, domains: what a folder teaches without masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from msformer.io.prepare import prepare_image, resize_image, resize_labels
from msformer.scoring import dice
from msformer.synthetic import synthetic_lesion
from msformer.training.domains import CT, DERMOSCOPY, DOMAINS, GENERIC, find_domain, guess_domain
from msformer.training.hairs import find_hairs, without_hairs
from msformer.training.kinds import Kind
from msformer.training.teachers import Teachers, rule_masks


def test_target_weight_and_agreement_by_hand() -> None:
    masks = np.array([[[1, 1, 0, 0]], [[1, 1, 1, 0]], [[1, 0, 0, 0]], [[1, 0, 0, 0]]], dtype=bool)
    teachers = Teachers(masks, ("a", "b", "c", "d"))
    assert teachers.target.tolist() == [[True, False, False, False]]
    np.testing.assert_allclose(teachers.weight, [[1, 0, 0.5, 1]])
    pairs = [4 / 5, 2 / 3, 2 / 3, 2 / 4, 2 / 4, 1]
    assert teachers.agreement == pytest.approx(sum(pairs) / 6)


@pytest.mark.parametrize(("domain", "count"), [(DERMOSCOPY, 6), (GENERIC, 3)])
def test_rules_find_a_lesion(domain: object, count: int) -> None:
    lesion = synthetic_lesion(3, 192, 192)
    teachers = rule_masks(resize_image(prepare_image(lesion.image), (97, 97)), domain)  # type: ignore[arg-type]
    assert teachers.masks.shape == (count, 97, 97)
    assert len(teachers.names) == count
    assert dice(teachers.target, resize_labels(lesion.mask, (97, 97))) > 0.85
    assert teachers.agreement > 0.8


def test_a_wrong_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"image: expected \[3, H, W\], got \(97, 97, 3\)"):
        rule_masks(torch.zeros(97, 97, 3), DERMOSCOPY)


def test_hairs_are_found_and_painted_over_but_not_what_is_wide() -> None:
    rows, columns = np.mgrid[:129, :129]
    image = np.full((129, 129, 3), 0.7, dtype=np.float32)
    blob = np.hypot(rows - 40, columns - 40) < 18
    image[blob] = 0.3
    clean = image.copy()
    hair = np.abs(rows + columns - 170) <= 1
    image[hair] = 0.15
    found = find_hairs(image.mean(2))
    assert found[hair].mean() > 0.9
    assert found[~hair].mean() < 0.03
    painted = without_hairs(image)
    assert np.abs(painted - clean)[hair].mean() < 0.05
    assert np.array_equal(painted[blob & ~found], image[blob & ~found])


def test_an_image_without_hairs_stays_the_same() -> None:
    image = np.full((65, 65, 3), 0.5, dtype=np.float32)
    assert without_hairs(image) is image


def test_domains_are_guessed_by_what_most_images_are() -> None:
    skin, slice_, plain = Kind(True, False), Kind(False, True), Kind(False, False)
    assert guess_domain([skin, skin, plain]) is DERMOSCOPY
    assert guess_domain([slice_, slice_, plain]) is CT
    assert guess_domain([plain]) is GENERIC
    assert find_domain("ct") is CT
    assert [DOMAINS[name].rule for name in ("dermoscopy", "ct", "generic")] == ["lesion", "lung", "central"]
    with pytest.raises(ValueError, match="domain: unknown 'x'; expected one of dermoscopy, ct, generic"):
        find_domain("x")
