"""Whether a network follows its teachers: measured on whole images, and said where it does not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

import msformer
from msformer.training.domains import DERMOSCOPY, GENERIC
from msformer.training.following import SAMPLE, doubts, followed, some_of
from msformer.training.kinds import Kind
from msformer.training.lessons import Pool
from msformer.training.sight import STANDARDISED
from msformer.training.views import shares
from tests.msformer.test_cli import run
from tests.msformer.training.data import dark_network
from tests.msformer.training.small import OPTIONS, save_lesions, small_pool

COLOUR, CT_SLICE = Kind(colour=True, ct=False), Kind(colour=False, ct=True)


def wrong_in(pool: Pool, count: int) -> Pool:
    """With targets that are the wrong way round in the first images."""
    target = pool.target.clone()
    target[:count] = 1 - target[:count]
    return replace(pool, target=target)


def test_the_median_of_whole_images() -> None:
    """Teachers that are wrong in less than half of the images are no reason to doubt the network."""
    network, pool = dark_network(shift=0.6), small_pool(5, 113)
    assert followed(network, pool, STANDARDISED) > 0.95
    assert followed(network, wrong_in(pool, 2), STANDARDISED) > 0.95
    assert followed(network, wrong_in(pool, 3), STANDARDISED) < 0.5
    ignored = replace(pool, target=wrong_in(pool, 5).target, weight=torch.zeros_like(pool.weight))
    assert followed(network, ignored, STANDARDISED) == 1, "pixels of which teachers know nothing do not count"


def test_an_object_that_fills_the_image_is_no_excuse() -> None:
    """A network that sees it everywhere agrees with its teachers on the object, but not on what is around it."""
    everywhere, pool = dark_network(shift=-9.0), small_pool(3, 113)
    assert shares(everywhere, pool.images[0], STANDARDISED, 113)[1].min() > 0.5
    large = torch.ones_like(pool.target)
    large[:, :, :20] = 0
    assert followed(everywhere, replace(pool, target=large), STANDARDISED) == 0


def test_some_images_of_many() -> None:
    pool = small_pool(3, 49)
    assert some_of(pool, SAMPLE) == [0, 1, 2]
    assert some_of(replace(pool, names=tuple(map(str, range(1000)))), 3) == [0, 499, 999]


def test_what_to_do_is_said() -> None:
    assert list(doubts(0.97, DERMOSCOPY, [COLOUR], 20)) == []
    (blind,) = doubts(0.812, GENERIC, [CT_SLICE, CT_SLICE, COLOUR], 1700)
    assert "in half of the images it agrees with them to 81 % or less" in blind
    assert "; try --domain ct, as the images look; or fit each image instead: msformer segment --mask." in blind
    (short,) = doubts(0.5, DERMOSCOPY, [COLOUR], 20)
    assert "; try more --steps than 20 (usual are 1700), or another --domain; or fit" in short


def test_a_network_that_learned_little_says_so_everywhere(tmp_path: Path) -> None:
    """On the terminal, each time; in the report, the record, on the card, and when the model is used."""
    save_lesions(tmp_path / "images", 2)
    model = tmp_path / "model"
    first = run("train", tmp_path / "images", "--out", model, *OPTIONS)
    assert first.exit_code == 0, first.output
    assert "warning: The network does not follow its teachers: in half of the images" in first.output
    training = json.loads((model / "model.json").read_text())["training"]
    (doubt,) = training["doubts"]
    assert training["median agreement with the targets, whole images"] < 0.9
    assert doubt in first.output
    assert doubt.replace("'", "&#39;") in (model / "report.html").read_text()
    assert doubt in (model / "README.md").read_text()
    again = run("train", tmp_path / "images", "--out", model, *OPTIONS)
    assert doubt in again.output, "a training that is finished says it as well"
    out = tmp_path / "out"
    used = run("segment", tmp_path / "images", "--out", out, "--model", model, "--mask")
    assert f"warning: {doubt}" in used.output
    assert json.loads((out / "summary.json").read_text())["warnings"] == [doubt]


def test_objectives_without_teachers_have_nobody_to_follow(tmp_path: Path) -> None:
    save_lesions(tmp_path / "images", 2)
    found = run("train", tmp_path / "images", "--out", tmp_path / "model", *OPTIONS, "--objective", "consistency")
    assert found.exit_code == 0, found.output
    assert msformer.load(tmp_path / "model", device="cpu").doubts == ()
