"""The study of trained models: names, ways to fuse, folds, and the whole command on small images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image as PILImage

from msformer.io.prepare import prepare_image, resize_image
from msformer.training.domains import DERMOSCOPY
from msformer.training.predict import object_mask, predict, shares_of
from msformer.training.teachers import TEACHER_SIZE, rule_masks
from studies import training, training_pictures
from studies.training import (
    FUSED,
    GATED,
    MAJORITY,
    MEAN,
    NET,
    WAYS,
    Way,
    best_way,
    by_image,
    data_set,
    fold_of,
    main,
    masks,
    model_of,
    table_of_choices,
)
from tests.msformer.evaluation import data
from tests.msformer.training.data import dark_model, save_dark_model

NAMES = [f"image-{number:02d}" for number in range(22)]


def scores(net: float, fused: float, confidence: float = 0.8, models: int = 1) -> pd.DataFrame:
    """Of as many images as there are `NAMES`; all that is not the network alone or `FUSED` is worth nothing."""
    row = {way.mask: 0.0 for way in WAYS} | {NET.mask: net, FUSED.mask: fused, "confidence": confidence}
    return pd.DataFrame([{"image": name, "model": model} | row for name in NAMES for model in range(models)])


def test_ways() -> None:
    """The network alone is taken above the limit only."""
    found = pd.DataFrame({"net alone": [0.1, 0.2], "confidence": [0.0, 0.8], "mean": [0.5, 0.6]})
    assert list(NET.scores(found)) == [0.1, 0.2]
    assert list(MEAN.scores(found)) == [0.5, 0.6]
    assert list(GATED.scores(found)) == [0.5, 0.2]
    assert list(Way("mean", 0.85).scores(found)) == [0.5, 0.6]
    assert len({way.name for way in WAYS}) == len(WAYS)
    assert FUSED in WAYS


def test_masks_are_those_of_predict(tmp_path: Path) -> None:
    model, image = dark_model(tmp_path, sharpness=0.5, shift=-0.5), prepare_image(data.lesion(data.disc(120, 140, 32)))
    probability = shares_of(model, image)[1]
    rules = rule_masks(resize_image(image, (TEACHER_SIZE, TEACHER_SIZE)), DERMOSCOPY).masks
    found = masks(probability, rules)
    assert set(found) == {way.mask for way in (*WAYS, MAJORITY)}
    for way, gate in ((NET, "net"), (FUSED, "fused")):
        expected = predict(model, image, gate=gate).mask  # type: ignore[arg-type]
        np.testing.assert_array_equal(object_mask(found[way.mask], "lesion", (120, 140)), expected)
    assert (found[MAJORITY.mask] > 0.5).sum() > 2000


def test_folds_are_even_and_the_same_for_all_models() -> None:
    folds = fold_of([*NAMES, *reversed(NAMES)])
    assert sorted(folds) == NAMES
    assert sorted(np.bincount(list(folds.values()))) == [4, 4, 4, 5, 5]
    assert [folds[name] for name in NAMES] != [place % 5 for place in range(len(NAMES))], "neighbours are often alike"


def test_the_best_way_is_that_of_the_mean_over_data_sets() -> None:
    few, many = scores(0.9, 0.8), pd.concat([scores(0.8, 0.85)] * 3)
    assert best_way([few]) == NET
    assert best_way([many]) == FUSED
    assert best_way([few, many]) == NET, "a set counts once, however large"
    assert by_image(NET, scores(0.9, 0.8, models=3)).shape == (len(NAMES),)


def test_images_do_not_choose_for_themselves() -> None:
    """One image changes the choice of all folds but its own."""
    found, folds = scores(0.9, 0.895), fold_of(NAMES)
    found.loc[found.image == NAMES[3], NET.mask] = 0.0
    mates = sum(folds[name] == folds[NAMES[3]] for name in NAMES) - 1
    expected = (0.9 * mates + 0.895 * (len(NAMES) - mates - 1)) / len(NAMES)
    alone = table_of_choices({"a": found})[1]
    assert alone[1].startswith(f"{100 * expected:.1f}")
    assert set(alone[2].split("; ")) == {NET.name, FUSED.name}
    others = table_of_choices({"a": found, "b": scores(0.72, 0.7)})[1]
    assert others[3:] == [f"{100 * by_image(NET, found).mean():.1f}{others[3][4:]}", NET.name]


def test_names_of_models(tmp_path: Path) -> None:
    data.make_pairs(tmp_path / "set")
    found = data_set(tmp_path / "set", tmp_path / "out")
    save_dark_model(found.out / "models" / "teacher-7")
    assert model_of(found, "teacher-7", 1).objective == "teacher"
    for name in ("teacher", "teacher-x", "teacher-1-rx"):
        with pytest.raises(ValueError, match=f"expected OBJECTIVE-SEED or OBJECTIVE-SEED-rROUNDS, got '{name}'"):
            model_of(found, name, 1)
    with pytest.raises(ValueError, match="'better'"):
        model_of(found, "better-1", 1)


def test_a_model_that_is_not_there_is_trained_without_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(training, "train", lambda files, folder, **options: asked.append((files, folder, options)))
    model_of(data_set(data.make_isic(tmp_path / "set"), tmp_path / "out"), "teacher-3-r2", 5)
    ((files, folder, options),) = asked
    assert [file.name for file in files] == ["ISIC_0000001.jpg", "ISIC_0000002.jpg"]
    assert folder == tmp_path / "out" / "set" / "models" / "teacher-3-r2"
    assert (options["objective"], options["seed"], options["rounds"], options["steps"]) == ("teacher", 3, 2, 5)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = data.make_pairs(tmp_path / "set"), tmp_path / "out"
    save_dark_model(out / "set" / "models" / "teacher-0")
    save_dark_model(out / "set" / "models" / "consistency-0", objective="consistency")
    arguments = ["--data", str(folder), "--out", str(out)]
    result = CliRunner().invoke(main, [*arguments, "--models", "teacher-0,consistency-0"])
    assert result.exit_code == 0, result.output
    text = (out / "study.md").read_text()
    for line in ("## set: 3 images", "| Otsu |", "| consistency-0 |", "| teacher-0, fused, 3 votes", "| net alone |"):
        assert line in text
    table = pd.read_csv(out / "set" / "scores.csv")
    assert list(table.image) == ["a", "b", "c"]
    assert table[NET.mask].min() > 0.9
    assert table[FUSED.mask].min() > 0.9
    monkeypatch.setattr(training, "rule_masks", None)  # all of it is kept
    monkeypatch.setattr(training, "shares_of", None)
    again = CliRunner().invoke(main, [*arguments, "--models", "teacher-0,consistency-0"])
    assert again.exit_code == 0, again.output
    assert (out / "study.md").read_text() == text
    wrong = CliRunner().invoke(main, [*arguments, "--models", "consistency-0"])
    assert wrong.exit_code == 2
    assert "expected one of the objective teacher at least, got consistency-0" in wrong.output
    picture = tmp_path / "picture.png"
    drawn = CliRunner().invoke(training_pictures.main, [*arguments, "--to", str(picture)])
    assert drawn.exit_code == 0, drawn.output
    with PILImage.open(picture) as image:
        assert image.width > 2 * image.height


def test_pictures_show_the_worst_and_some_of_the_others() -> None:
    table = scores(0.9, 0.9)
    table[FUSED.mask] = np.linspace(1, 0, len(NAMES))
    names = training_pictures.chosen(table)
    assert names[:5] == NAMES[:-6:-1]
    assert names[5:] == [NAMES[place] for place in (16, 12, 8, 4, 0)]
