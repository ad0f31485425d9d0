"""``msformer segment --model``: files, records, resuming, what refining does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image as PILImage

import msformer.runs.ways
from msformer.scoring import dice
from tests.msformer.conftest import QUICK_OPTIONS
from tests.msformer.evaluation.data import chest, disc, lesion, lungs, save
from tests.msformer.test_cli import files, run, write_dicom
from tests.msformer.training.data import save_dark_model

TRUTH = disc(60, 70, 16)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    save(folder / "a.png", lesion(TRUTH))
    save(folder / "sub" / "b.png", lesion(TRUTH)[::-1].copy())
    return folder


def pixels(path: Path) -> NDArray[Any]:
    with PILImage.open(path) as image:
        return np.asarray(image)


def record(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_a_folder(images: Path, tmp_path: Path) -> None:
    model, out = save_dark_model(tmp_path / "model"), tmp_path / "out"
    result = run("segment", images, "--out", out, "--model", model, "--mask")
    assert result.exit_code == 0, result.output
    endings = (".json", ".labels.png", ".mask.png", ".overlay.png", ".probability.png")
    expected = {f"{name}{ending}" for name in ("a", "sub/b") for ending in endings}
    assert files(out) == expected | {"contact-sheet.png", "report.html", "summary.json"}
    assert "a: confidence 0." in result.output
    assert "2 of 2 images" in result.output
    mask, probability, labels = (pixels(out / f"a.{kind}.png") for kind in ("mask", "probability", "labels"))
    assert mask.shape == probability.shape == labels.shape == TRUTH.shape
    assert set(np.unique(mask)) == {0, 255}
    assert dice(mask > 0, TRUTH) > 0.93
    assert dice(probability > 127, TRUTH) > 0.93
    assert dice(labels == 1, TRUTH) > 0.93
    found = record(out / "a.json")
    assert 0.5 < found["confidence"] < 1
    assert (found["decided_by"], found["rule"], found["fitted_size"]) == ("fused", "lesion", [49, 49])
    assert "losses" not in found
    assert found["settings"]["domain"] == "dermoscopy"
    summary = record(out / "summary.json")
    assert summary["images"][0]["confidence"] == found["confidence"]
    assert summary["settings"]["model"] == found["settings"]["model"]


def test_without_masks_the_rules_are_not_asked(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msformer.training.predict.rule_masks", None)
    model, out = save_dark_model(tmp_path / "model", sharpness=0.5), tmp_path / "out"
    result = run("segment", images / "a.png", "--out", out, "--model", model)
    assert result.exit_code == 0, result.output
    assert not (out / "a.mask.png").exists()
    assert "decided_by" not in record(out / "a.json")


def test_images_of_another_kind_than_the_model_knows(images: Path, tmp_path: Path) -> None:
    model, out = save_dark_model(tmp_path / "model"), tmp_path / "out"
    path = model / "model.json"
    doubt = "most of these images are colour, but the model was trained on images that are grey or CT"
    for kinds, doubted in (({"grey": 90, "CT": 2}, True), ({"grey": 90, "colour": 9}, False), ({}, False)):
        path.write_text(json.dumps(record(path) | {"training": {"kinds": kinds}}))
        result = run("segment", images, "--out", out, "--model", model, "--mask")
        assert result.exit_code == 0, "it is no more than a warning"
        assert (f"warning: {doubt}" in result.output) == doubted
        warnings = record(out / "summary.json").get("warnings", [])
        assert [text.startswith(doubt) for text in warnings] == [True] * doubted


def test_done_for_the_same_model_only(images: Path, tmp_path: Path) -> None:
    one, other, out = (
        save_dark_model(tmp_path / "one"),
        save_dark_model(tmp_path / "other", shift=0.1),
        tmp_path / "out",
    )
    copy = save_dark_model(tmp_path / "copy")

    def done(*options: object) -> bool:
        result = run("segment", images, "--out", out, *options)
        assert result.exit_code == 0, result.output
        return "2 of 2 images were already done" in result.output

    assert not done("--model", one, "--mask")
    assert done("--model", copy, "--mask"), "the same weights in another folder"
    (out / "a.probability.png").unlink()
    assert not done("--model", one, "--mask")
    assert not done("--model", one, "--mask", "--select", "dark")
    assert not done("--model", other, "--mask", "--select", "dark")
    assert not done(*QUICK_OPTIONS)
    assert not done("--model", other, "--mask", "--select", "dark")
    assert not done("--model", other, "--mask", "--select", "dark", "--refine", *QUICK_OPTIONS)
    assert done("--model", other, "--mask", "--select", "dark", "--refine", *QUICK_OPTIONS)


def test_refining_fits_and_fuses(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The label map and the losses are the fit's, the probability the network's, the mask of both and of the rules."""
    model, out, fit = save_dark_model(tmp_path / "model", sharpness=0.5), tmp_path / "out", tmp_path / "fit"
    asked: list[dict[str, Any]] = []
    original = msformer.training.predict.predict

    def predict(*arguments: Any, **options: Any) -> Any:
        asked.append(options)
        return original(*arguments, **options)

    monkeypatch.setattr("msformer.training.predict.predict", predict)
    options = ("segment", images / "a.png", "--mask", *QUICK_OPTIONS)
    assert run(*options, "--out", fit).exit_code == 0
    result = run(*options, "--out", out, "--model", model, "--refine")
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(pixels(out / "a.labels.png"), pixels(fit / "a.labels.png"))
    found, alone = record(out / "a.json"), record(fit / "a.json")
    assert (found["losses"], found["decided_by"]) == (alone["losses"], "refined")
    assert found["settings"]["refine"]["max_steps"] == alone["settings"]["max_steps"]
    assert (out / "a.probability.png").exists()
    (options_of_predict,) = asked
    (vote,) = options_of_predict["votes"]
    assert options_of_predict["gate"] == "fused"
    np.testing.assert_array_equal(vote, pixels(fit / "a.mask.png") > 0)


def test_clusters(images: Path, tmp_path: Path) -> None:
    model, out = save_dark_model(tmp_path / "model", objective="consistency"), tmp_path / "out"
    result = run("segment", images, "--out", out, "--model", model, "--mask")
    assert result.exit_code == 0, result.output
    assert record(out / "a.json")["decided_by"] == "rule"
    assert dice(pixels(out / "a.mask.png") > 0, TRUTH) > 0.9
    refined = run("segment", images, "--out", out, "--model", model, "--mask", "--refine")
    assert refined.exit_code == 1
    assert "refine: the model knows clusters (objective consistency), expected teacher" in refined.output


def test_volumes(tmp_path: Path) -> None:
    """Probabilities of NIfTI and DICOM files are volumes of floats on the voxels of the input."""
    folder, out = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    model = save_dark_model(tmp_path / "model", domain="ct")
    values = chest(lungs(64))
    affine = np.diag([-2.0, -3, 5, 1])
    volume = np.stack([np.roll(values, 3 * i, axis=0).T for i in range(3)], axis=2)
    nibabel.save(nibabel.Nifti1Image(volume, affine), folder / "chest.nii.gz")
    write_dicom(folder / "slice", values)
    tifffile.imwrite(folder / "flat.tif", values)
    options = ("segment", folder, "--out", out, "--model", model, "--mask")
    assert run(*options).exit_code == 0
    one = np.asarray(nibabel.load(out / "chest.probability.nii.gz").dataobj)
    assert one.dtype == np.float32
    assert [bool(one[..., i].any()) for i in range(3)] == [False, True, False]
    result = run(*options, "--slice", "all")
    assert result.exit_code == 0, result.output
    for kind, scale in (("probability", 255), ("mask", 1)):
        written = nibabel.load(out / f"chest.{kind}.nii.gz")
        np.testing.assert_allclose(written.affine, affine)
        for i in range(3):
            shown = pixels(out / f"chest-slice-{i:03d}.{kind}.png") / (scale if kind == "probability" else 255)
            np.testing.assert_allclose(np.asarray(written.dataobj)[..., i].T, shown, atol=1e-6)
    assert nibabel.load(out / "slice.probability.nii.gz").shape == (64, 64, 1)
    assert not (out / "flat.probability.nii.gz").exists()
    assert record(out / "flat.json")["rule"] == "lung"


def test_several_at_once_give_what_one_at_a_time_gives(images: Path, tmp_path: Path) -> None:
    model = save_dark_model(tmp_path / "model", sharpness=0.5)
    (images / "broken.png").write_bytes(b"no image")
    found = []
    for at_once in (1, 3):
        out = tmp_path / str(at_once)
        result = run("segment", images, "--out", out, "--model", model, "--mask", "--at-once", at_once)
        assert result.exit_code == 1
        assert "2 of 3 images" in result.output
        found.append({path.name: path.read_bytes() for path in out.rglob("*.png")})
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--model", "gone"], 1, "error: gone: no such folder"),
        (["--model", "images"], 1, "error: images: no model, model.json is missing"),
        (["--model", "model", "--size", "64", "--ce", "2"], 2, "--size, --ce: of a fit, which --model does not make"),
        (["--model", "model", "--preset", "quick"], 2, "--preset: of a fit"),
        (["--refine"], 2, "--refine is for --model, which is not given"),
        (["--model", "model", "--select", "dark"], 2, "--select is for --mask"),
        (["--model", "model", "--backend", "tpu"], 2, "'tpu' is not one of 'reference'"),
    ],
)
def test_errors_of_usage(
    options: list[str], code: int, message: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_dark_model(tmp_path / "model")
    result = run("segment", "images", "--out", "out", *options)
    assert result.exit_code == code, result.output
    assert message in result.output
    assert not (tmp_path / "out").exists()
