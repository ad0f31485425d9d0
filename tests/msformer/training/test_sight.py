"""What a network sees: the same in training and afterwards, and enough to tell lungs from the air around the body."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import msformer
from msformer.io.prepare import prepare_image, standardise_channels
from msformer.io.read import Reading
from msformer.runs.plan import Job
from msformer.training.batches import Batches
from msformer.training.domains import CT, DERMOSCOPY
from msformer.training.lessons import Request, make_lesson, make_pool
from msformer.training.predict import predict, shares_of
from msformer.training.saved import ModelError, TrainedModel, load
from msformer.training.sight import BODY, STANDARDISED, find_sight
from msformer.training.views import shares
from tests.msformer.evaluation.data import chest, lungs
from tests.msformer.training.data import dark_model, save_dark_model
from tests.msformer.training.test_augment import STILL

SLICE = prepare_image(np.clip((chest(lungs(129)) + 512) / 1024, 0, 1))


def test_all_around_the_body_is_white_and_the_rest_as_it_was() -> None:
    seen = BODY.paint(SLICE)
    assert (SLICE[:, 0] == 0).all()
    assert (seen[:, 0] == 1).all()
    within = seen != 1
    assert torch.equal(seen[within], SLICE[within])
    assert (seen[:, lungs(129)] == 0).all()
    assert torch.equal(BODY(SLICE), 2 * seen - 1)
    assert BODY.paint(torch.zeros(3, 33, 33)).min() == 1, "no body"


def test_colours_are_standardised() -> None:
    image = torch.rand(3, 33, 33)
    assert torch.equal(STANDARDISED(image), standardise_channels(image))
    assert DERMOSCOPY.sight is STANDARDISED
    assert CT.sight is BODY
    with pytest.raises(ValueError, match="sight: unknown 'blind'; expected one of standardised, body"):
        find_sight("blind")


def test_training_and_prediction_see_the_same(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "ct.tif"
    tifffile.imwrite(path, chest(lungs(129)))
    request = Request(Job(path, "slice"), Reading(), CT, True, 0)
    pool = make_pool({"slice": make_lesson(request, tmp_path)}, CT.sight)
    image = prepare_image(path)
    torch.testing.assert_close(pool.images[0].float() / 255, BODY.paint(image), rtol=0, atol=1 / 255)
    crop = Batches(pool, STILL, CT.sight, seed=0, batch=1, sizes=(129,)).make(0).images
    assert crop.min() == pytest.approx(-1, abs=0.01)
    assert crop.max() == pytest.approx(1, abs=0.01)
    model = replace(dark_model(tmp_path / "model", domain="ct"), size=129)
    asked, watched = shares_of(model, image), shares(model.network, pool.images[0], CT.sight, model.size).numpy()
    assert np.abs(asked - watched).mean() < 1e-3
    assert not predict(model, image, gate="net").mask[0].any()


def test_a_model_sees_as_it_was_trained(tmp_path: Path) -> None:
    folder = save_dark_model(tmp_path, domain="ct")
    assert load(folder, device="cpu").sight is BODY
    assert "all around the body is painted white" in (folder / "README.md").read_text()
    path = folder / "model.json"
    facts = json.loads(path.read_text())
    facts |= {"format": 1, "preprocessing": {"size": 49, "standardise": "each channel of each image"}}
    path.write_text(json.dumps(facts))
    assert load(folder, device="cpu").sight is STANDARDISED, "before there was another"
    facts["preprocessing"]["sight"] = "x-ray"
    path.write_text(json.dumps(facts))
    with pytest.raises(ModelError, match=r"model\.json: sight: unknown 'x-ray'"):
        load(folder)


def test_lungs_are_told_from_the_air_around_the_body(tmp_path: Path) -> None:
    """Both are black in the window of CT. A network of the domain generic cannot, and that is said."""
    tifffile = pytest.importorskip("tifffile")
    (tmp_path / "slices").mkdir()
    for number in range(4):
        truth = np.roll(lungs(64), number - 2, axis=0)
        tifffile.imwrite(tmp_path / "slices" / f"ct-{number}.tif", chest(truth))

    def trained(domain: str | None) -> TrainedModel:
        return msformer.train(
            tmp_path / "slices",
            tmp_path / f"model-{domain}",
            domain=domain,
            steps=30,
            batch=2,
            embed_dim=8,
            learning_rate=1e-2,
            workers=1,
            device="cpu",
            progress=False,
        )

    model = trained(None)
    assert model.domain == "ct"
    assert model.training["final agreement with the targets"] > 0.8
    assert model.doubts == ()
    found = model.predict(tmp_path / "slices" / "ct-0.tif", gate="net").mask
    assert not found[:4].any()
    assert found[np.roll(lungs(64), -2, axis=0)].mean() > 0.9
    (doubt,) = trained("generic").doubts
    assert "try more --steps than 30 (usual are 1700), or --domain ct, as the images look" in doubt
