"""Models by name: folders, and a cache of the Hugging Face Hub as it is without a network."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image as PILImage

import msformer
from msformer import MSFormer, TrainedModel
from msformer.cli import main
from msformer.synthetic import synthetic_lesion
from msformer.training.weights import ModelError
from tests.msformer.training.data import dark_network, save_dark_model

COMMIT = "0123456789" * 4


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a Hub that has ``org/moles`` and ``org/bare``, tagged v1, while the machine is offline."""
    constants = pytest.importorskip("huggingface_hub.constants")
    for name in ("moles", "bare"):
        repository = tmp_path / "hub" / f"models--org--{name}"
        (repository / "refs").mkdir(parents=True)
        for reference in ("main", "v1"):
            (repository / "refs" / reference).write_text(COMMIT)
    save_dark_model(tmp_path / "hub" / "models--org--moles" / "snapshots" / COMMIT)
    dark_network().save_pretrained(tmp_path / "hub" / "models--org--bare" / "snapshots" / COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def same(network: MSFormer, other: MSFormer) -> bool:
    values = other.state_dict()
    return all(torch.equal(value, values[name]) for name, value in network.state_dict().items())


def test_a_trained_model_is_saved_and_loaded_as_elsewhere(tmp_path: Path) -> None:
    model = TrainedModel.from_pretrained(save_dark_model(tmp_path / "a"), device="cpu")
    assert model.license is None
    model.save_pretrained(tmp_path / "b", license="cc-by-4.0")
    again = msformer.load(tmp_path / "b", device="cpu")
    assert (again.digest, again.training, again.license) == (model.digest, model.training, "cc-by-4.0")
    again.save_pretrained(tmp_path / "c")
    assert "license: cc-by-4.0\n" in (tmp_path / "c" / "README.md").read_text()
    with pytest.raises(ValueError, match=r"license: expected an identifier such as mit or cc-by-4\.0, got 'my own'"):
        model.save_pretrained(tmp_path / "d", license="my own")
    assert not (tmp_path / "d").exists()


def test_a_model_keeps_what_it_sees_when_it_is_saved_again(tmp_path: Path) -> None:
    """One of format 1 for CT saw what later ones of that domain do not."""
    folder = save_dark_model(tmp_path / "old", domain="ct")
    description = json.loads((folder / "model.json").read_text())
    del description["preprocessing"]["sight"]
    (folder / "model.json").write_text(json.dumps(description | {"format": 1}))
    old = msformer.load(folder, device="cpu")
    old.save_pretrained(tmp_path / "new")
    assert msformer.load(tmp_path / "new", device="cpu").sight == old.sight


def test_a_network_is_saved_and_loaded(tmp_path: Path) -> None:
    network = MSFormer(4, 6, 3, depth=2, num_heads=2, mlp_ratio=2).bfloat16()
    network.save_pretrained(tmp_path, license="mit")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    again = MSFormer.from_pretrained(tmp_path)
    assert not again.training
    assert same(again, network.float())
    card = (tmp_path / "README.md").read_text()
    assert "license: mit\n" in card
    assert "has not said here" in card
    with pytest.raises(ValueError, match=r"license: expected an identifier such as mit .*, got 'my own'"):
        network.save_pretrained(tmp_path / "refused", license="my own")
    assert not (tmp_path / "refused").exists()


def test_a_network_of_a_trained_model(tmp_path: Path) -> None:
    network = MSFormer.from_pretrained(save_dark_model(tmp_path))
    assert same(network, dark_network())
    assert all(parameter.requires_grad for parameter in network.parameters())
    with pytest.raises(ValueError, match="holds a trained model, whose weights these are not; take another"):
        network.save_pretrained(tmp_path)
    assert same(MSFormer.from_pretrained(tmp_path), network)


def test_networks_that_are_not_loaded(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model, model\.json is missing"):
        MSFormer.from_pretrained(tmp_path)
    for config, message in (
        ("{", r"config\.json: damaged"),
        ("3", r"config\.json: expected an object"),
        ('{"layers": 3}', r"config\.json: .*unexpected keyword argument 'layers'"),
        ('{"embed_dim": 8}', r"model\.safetensors does not fit the architecture in config\.json"),
    ):
        dark_network().save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(ModelError, match=message):
            MSFormer.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        MSFormer.from_pretrained(tmp_path)


def test_a_model_of_the_hub(hub: Path) -> None:
    model = msformer.load("org/moles", device="cpu")
    assert same(model.network, dark_network())
    assert model.digest == msformer.load(Path("org/moles"), revision="v1", device="cpu").digest
    assert same(MSFormer.from_pretrained("org/bare"), dark_network())
    assert same(MSFormer.from_pretrained("org/moles", revision=COMMIT), dark_network())


def test_a_model_of_the_hub_on_the_command_line(hub: Path, tmp_path: Path) -> None:
    PILImage.fromarray(synthetic_lesion(0, 64, 64).image).save(tmp_path / "a.png")
    command = ["segment", "a.png", "--model", "org/moles", "--mask", "--out", "out", "--device", "cpu"]
    found = CliRunner().invoke(main, command)
    assert found.exit_code == 0, found.output
    assert (tmp_path / "out" / "a.mask.png").exists()
    found = CliRunner().invoke(main, [*command[:3], "org/cells", *command[4:]])
    assert found.exit_code == 1
    assert "error: org/cells: no such folder, nor a model of the Hugging Face Hub" in found.output


def test_names_that_are_not_asked_for_on_the_hub(hub: Path, tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()  # its folders are meant
    for name in ("org/moles", "../org/moles", "/org/moles", "moles", "org/moles/new"):
        with pytest.raises(FileNotFoundError, match=r": no such folder$"):
            msformer.load(name)
    save_dark_model(tmp_path / "org" / "moles")
    assert msformer.load("org/moles", device="cpu").folder == Path("org/moles")
    with pytest.raises(
        ValueError, match=r"revision: 'v1' is for models of the Hugging Face Hub, got the folder org/moles"
    ):
        msformer.load("org/moles", revision="v1")


def test_a_revision_that_is_not_there(hub: Path) -> None:
    with pytest.raises(FileNotFoundError, match="org/moles: no such folder, nor a model of the Hugging Face Hub"):
        msformer.load("org/moles", revision="v2")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"org/moles: no such folder; .* run: pip install 'msformer\[hub\]'"):
        msformer.load("org/moles")
    assert msformer.load(save_dark_model(tmp_path / "a" / "moles"), device="cpu").folder == tmp_path / "a" / "moles"


def test_the_hub_reads_the_card(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    save_dark_model(tmp_path)
    data = hub.ModelCard.load(tmp_path / "README.md").data
    assert (data.library_name, data.license, data.pipeline_tag) == ("msformer", "unknown", "image-segmentation")
    assert {"msformer", "medical", "dermoscopy"} <= set(data.tags)
