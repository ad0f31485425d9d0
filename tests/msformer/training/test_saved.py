"""Trained models in a folder: written whole, read years later, refused with a reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as tensor_bytes

import msformer
from msformer import MSFormer
from msformer.output import OutputError
from msformer.training import weights
from msformer.training.predict import predict
from msformer.training.saved import ModelError, architecture_of, load, save_model
from tests.msformer.training.data import FACTS, dark_network, save_dark_model

GOLDEN = Path(__file__).parents[2] / "data" / "trained_model_format_1"


def test_a_model_of_an_earlier_version_says_what_it_said() -> None:
    golden = load_file(GOLDEN / "golden.safetensors")
    model = msformer.load(GOLDEN, device="cpu")
    assert (model.domain, model.objective, model.size, model.training["images"]) == ("generic", "teacher", 49, 4)
    found = predict(model, golden["image"], gate="net", backend="reference").probability
    assert golden["probability"].std() > 0.05
    torch.testing.assert_close(torch.from_numpy(found), golden["probability"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"embed_dim": 8, "num_clusters": 2, "depth": 2, "num_heads": 4},
        {"in_channels": 1, "embed_dim": 6, "num_clusters": 5, "depth": 1, "mlp_ratio": 2.5},
    ],
)
def test_saved_and_loaded(options: dict[str, Any], tmp_path: Path) -> None:
    network = MSFormer(**options)
    with torch.no_grad():
        network(torch.rand(2, options.get("in_channels", 3), 33, 33))  # running statistics of their own
    assert {"num_heads": 1, "mlp_ratio": 4, "in_channels": 3, **options} == architecture_of(network)
    save_model(tmp_path / "a" / "m", network, domain="ct", objective="published", size=65, training=FACTS)
    model = load(tmp_path / "a" / "m", device="cpu")
    assert model.network.state_dict().keys() == network.state_dict().keys()
    assert all((model.network.state_dict()[name] == value).all() for name, value in network.state_dict().items())
    assert not model.network.training
    assert not any(parameter.requires_grad for parameter in model.network.parameters())
    assert (model.domain, model.objective, model.size, model.training) == ("ct", "published", 65, FACTS)
    assert model.version == msformer.__version__
    assert sorted(path.name for path in (tmp_path / "a" / "m").iterdir()) == [
        "README.md",
        "model.json",
        "model.safetensors",
    ]


def test_the_digest_is_of_all_that_decides(tmp_path: Path) -> None:
    def digest(network: MSFormer, **options: Any) -> str:
        given = {"domain": "ct", "objective": "teacher", "size": 65, "training": FACTS} | options
        save_model(tmp_path, network, **given)
        return load(tmp_path, device="cpu").digest

    network = dark_network()
    same = digest(network)
    assert digest(dark_network(), training={"seconds": 3}) == same
    others = {digest(network, **{name: value}) for name, value in (("domain", "generic"), ("size", 97))}
    others.add(digest(dark_network(sharpness=3)))
    assert len(others - {same}) == 3


def test_half_precision_is_kept_in_float32(tmp_path: Path) -> None:
    save_model(tmp_path, MSFormer(3, 6, 2, depth=1).bfloat16(), domain="ct", objective="teacher", size=49, training={})
    assert {value.dtype for value in load(tmp_path, device="cpu").network.parameters()} == {torch.float32}


def test_the_card_says_what_the_model_is(tmp_path: Path) -> None:
    card = (save_dark_model(tmp_path / "moles") / "README.md").read_text()
    for part in ("**dermoscopy**", "--model moles", "width 6, 1 block in", "49 x 49", "- images: 3\n", "  - mean: 0.5"):
        assert part in card
    assert "{" not in card
    assert "license: unknown\n" in card
    assert "- nothing was recorded" in card


def test_the_card_has_the_doubts_and_scores_of_the_training_and_no_others(tmp_path: Path) -> None:
    training = {**FACTS, "final agreement with the targets": 0.871, "doubts": ["Do not rely on its masks."]}
    save_model(tmp_path, dark_network(), domain="ct", objective="teacher", size=49, training=training, license="mit")
    card = (tmp_path / "README.md").read_text()
    front, limits, scores, rest = re.split(r"\n## (?:Limits|How good it is|Network)\n", card)
    assert "license: mit" in front
    assert "- ct\n" in front
    assert "- Do not rely on its masks." in limits
    assert "- final agreement with the targets: 0.871" in scores
    assert "agreement" not in rest
    assert "`mit`, as whoever saved it said" in rest


def test_an_interrupted_save_leaves_no_half_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_dark_model(tmp_path)

    def full(*arguments: Any, **options: Any) -> None:
        raise OutputError("no space left")

    monkeypatch.setattr(weights, "write_json", full)
    with pytest.raises(OutputError):
        save_dark_model(tmp_path, sharpness=3.0)
    with pytest.raises(FileNotFoundError, match=r"no model, model\.json is missing"):
        load(tmp_path)


def test_facts_that_are_no_json_leave_the_old_model(tmp_path: Path) -> None:
    save_dark_model(tmp_path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_model(
            tmp_path, dark_network(), domain="ct", objective="teacher", size=49, training={"loss": torch.zeros(1)}
        )
    assert load(tmp_path, device="cpu").domain == "dermoscopy"


def test_models_that_are_not_saved(tmp_path: Path) -> None:
    given: dict[str, Any] = {"domain": "ct", "objective": "teacher", "size": 65, "training": {}}
    for wrong, message in (
        ({"domain": "mri"}, "domain: unknown 'mri'; expected one of dermoscopy, ct, generic"),
        ({"objective": "best"}, "objective: unknown 'best'; expected one of teacher, consistency, published"),
        ({"size": 32}, "size: 32 pixels are too small, expected at least 33"),
    ):
        with pytest.raises(ValueError, match=message):
            save_model(tmp_path, dark_network(), **given | wrong)
    network = dark_network()
    network.linear_down.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinite values, in linear_down\.weight"):
        save_model(tmp_path, network, **given)
    assert not list(tmp_path.iterdir())


def change(folder: Path, **facts: Any) -> None:
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def test_models_that_are_not_loaded(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone: no such folder"):
        load(tmp_path / "gone")
    architecture = {"in_channels": 3, "embed_dim": 8, "num_clusters": 2, "depth": 1}
    for facts, message in (
        ({"format": 3, "version": "9.1"}, r"format 3, of msformer 9\.1; this is msformer .*formats up to 2: upgrade"),
        ({"domain": "mri"}, r"model\.json: domain: unknown 'mri'"),
        ({"objective": "best"}, r"model\.json: objective: unknown 'best'"),
        ({"architecture": {"layers": 3}}, r"model\.json: .*unexpected keyword argument 'layers'"),
        ({"architecture": architecture}, r"model\.safetensors does not fit the architecture in model\.json"),
        ({"preprocessing": {}}, r"model\.json: 'size' is missing"),
        ({"preprocessing": {"size": 49.5}}, r"model\.json: size: expected a whole number of pixels, got 49\.5"),
        ({"training": 3}, r"model\.json: training: expected dict, got 3"),
        ({"format": 0}, "not the description of a model"),
        ({"sha256": "0"}, r"model\.safetensors is damaged, or not the file"),
        ({"format": None}, "not the description of a model"),
    ):
        change(save_dark_model(tmp_path), **facts)
        with pytest.raises(ModelError, match=message):
            load(tmp_path)
    save_dark_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        load(tmp_path)
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(ModelError, match="damaged"):
        load(tmp_path)
    (tmp_path / "model.json").write_text('{"format": 1}')
    with pytest.raises(ModelError, match=r"architecture, domain, objective, .* is missing"):
        load(tmp_path)
    save_dark_model(tmp_path)
    with pytest.raises(ValueError, match="device: 'warp' cannot be used"):
        load(tmp_path, device="warp")


def test_weights_that_are_no_safetensors(tmp_path: Path) -> None:
    import hashlib

    save_dark_model(tmp_path)
    for content in (b"no tensors", tensor_bytes({"weight": torch.zeros(1)})):
        (tmp_path / "model.safetensors").write_bytes(content)
        change(tmp_path, sha256=hashlib.sha256(content).hexdigest())
        with pytest.raises(ModelError, match="does not fit the architecture"):
            load(tmp_path)
