"""Trained models beside the other methods of an evaluation."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image as PILImage

from msformer.evaluation import command
from msformer.evaluation.models import is_model, model_method
from tests.msformer.evaluation import data
from tests.msformer.evaluation.test_command import evaluate
from tests.msformer.training.data import save_dark_model


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    data.make_pairs(tmp_path / "data", ("a", "b"))
    return tmp_path / "data"


def test_a_model_and_its_parts(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = save_dark_model(tmp_path / "moles", sharpness=1.0, shift=-0.6), tmp_path / "out"
    names = f"otsu, {model}/:net, {model}/"
    arguments = ("--data", pairs, "--out", out, "--methods", names)
    result = evaluate(*arguments)
    assert result.exit_code == 0, result.output
    scores = pd.read_csv(out / "scores.csv")
    assert scores.image.nunique() == 2
    methods = list(scores.method.unique())
    assert methods[:2] == ["everything", "otsu"]
    net, fused = methods[2:]
    assert fused.startswith("model-moles-")
    assert net == f"{fused}-net"
    blind = scores[scores.protocol == "blind"].groupby("method").dsc.mean()
    assert blind[fused] > blind[net] + 0.005, "a net that is not sure"
    assert blind[fused] > 0.9
    best = scores[scores.protocol == "oracle"].groupby("method").dsc.mean()
    assert best[fused] >= blind[fused] - 1e-6
    text = (out / "report.md").read_text()
    for title in ("moles, net alone", "less "):
        assert title in text
    assert (out / "report.html").read_text().count("moles, net alone") >= 2
    monkeypatch.setattr(command.Store, "fit", None)
    again = evaluate(*arguments)
    assert again.exit_code == 0, again.output
    assert "8 of 8 label maps were already done" in again.output
    pd.testing.assert_frame_equal(pd.read_csv(out / "scores.csv"), scores)


def test_the_mask_is_the_models_own(pairs: Path, tmp_path: Path) -> None:
    """Not one that the rule of the evaluation chooses; and it is kept with the label map."""
    model, out = save_dark_model(tmp_path / "moles"), tmp_path / "out"
    for rule in ("lesion", "lung"):
        result = evaluate("--data", pairs, "--out", out, "--methods", model, "--select", rule)
        assert result.exit_code == 0, result.output
        scores = pd.read_csv(out / "scores.csv")
        assert scores[(scores.protocol == "blind") & scores.method.str.startswith("model-")].dsc.min() > 0.9
    (mask,) = out.glob("maps/model-moles-*-masks/a.png")
    with PILImage.open(mask) as image:
        assert set(np.unique(np.asarray(image))) == {0, 1}
    mask.unlink()
    assert (
        "5 of 6 label maps were already done" in evaluate("--data", pairs, "--out", out, "--methods", f"{model}").output
    )


def test_another_model_is_another_method(pairs: Path, tmp_path: Path) -> None:
    one, two = save_dark_model(tmp_path / "a" / "m"), save_dark_model(tmp_path / "b" / "m", sharpness=2.0)
    copy = save_dark_model(tmp_path / "c" / "m")
    out = tmp_path / "out"
    result = evaluate("--data", pairs, "--out", out, "--methods", f"{one},{two},{copy}")
    assert result.exit_code == 0, result.output
    assert len(list(out.glob("maps/model-m-*[!s]"))) == 2


def test_clusters(pairs: Path, tmp_path: Path) -> None:
    model, out = save_dark_model(tmp_path / "clusters", objective="consistency"), tmp_path / "out"
    result = evaluate("--data", pairs, "--out", out, "--methods", f"{model}/")
    assert result.exit_code == 0, result.output
    scores = pd.read_csv(out / "scores.csv")
    assert scores[(scores.protocol == "blind") & scores.method.str.startswith("model-")].dsc.min() > 0.9
    wrong = evaluate("--data", pairs, "--out", out, "--methods", f"{model}:net")
    assert wrong.exit_code == 1
    assert "the model knows clusters (objective consistency), and has no parts" in wrong.output


def test_names_that_mean_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_dark_model(tmp_path / "otsu")
    save_dark_model(tmp_path / "moles")
    assert [
        is_model(name) for name in ("otsu", "all", "moles", "moles:net", "./otsu", "gone/", "gone", "kmeans-4")
    ] == [
        *(False, False, True, True),
        *(True, True, False, False),
    ]
    assert model_method("./otsu", "cpu").name.startswith("model-otsu-")


@pytest.mark.parametrize(
    ("methods", "code", "message"),
    [
        ("gone/", 1, "error: gone: no such folder"),
        ("gone", 2, "methods: unknown 'gone'; expected some of all, everything"),
    ],
)
def test_models_that_are_not_there(methods: str, code: int, message: str, pairs: Path, tmp_path: Path) -> None:
    result = evaluate("--data", pairs, "--out", tmp_path / "out", "--methods", methods)
    assert result.exit_code == code
    assert message in result.output


class Killed(BaseException):
    """Nothing handles it."""


def left(out: Path) -> dict[str, object]:
    """All that an evaluation left, by file, but for seconds, and for the pages, which show them."""
    found: dict[str, object] = {}
    for path in sorted(out.rglob("*.*")):
        name = path.relative_to(out).as_posix()
        if path.suffix == ".json":
            found[name] = json.loads(path.read_text()) | {"seconds": None, "command": None}
        elif path.suffix == ".csv":
            found[name] = pd.read_csv(path).drop(columns="seconds").to_csv()
        else:
            found[name] = path.read_bytes() if path.suffix == ".png" else None
    return found


def test_killed_before_some_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command goes on to the files of an evaluation that nobody stopped; also over those of another seed."""
    model, pairs = save_dark_model(tmp_path / "moles"), data.make_pairs(tmp_path / "data", ("a",))
    monkeypatch.setattr("msformer.evaluation.command.write_page", lambda *about: {})
    arguments = ("--data", pairs, "--methods", f"kmeans-2,{model}/,{model}/:net")
    assert evaluate(*arguments, "--out", tmp_path / "whole").exit_code == 0
    expected = left(tmp_path / "whole")
    replace = os.replace
    for point in range(0, 16, 3):
        out, after = tmp_path / str(point), iter(range(point, -1, -1))
        if point % 2:
            assert evaluate(*arguments, "--out", out, "--seed", "1").exit_code == 0

        def stopped(*names: Path, after: Iterator[int] = after) -> None:
            if next(after) == 0:
                raise Killed
            replace(*names)

        with monkeypatch.context() as changed:
            changed.setattr(os, "replace", stopped)
            with pytest.raises(Killed):
                evaluate(*arguments, "--out", out)
        again = evaluate(*arguments, "--out", out)
        assert again.exit_code == 0, again.output
        assert left(out) == expected, point
