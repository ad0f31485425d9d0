"""The study of presets: its variants, that its fit is that of `segment`, and its table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from msformer.baselines import Task
from msformer.baselines.ms_former import label_map
from msformer.io.prepare import prepare_image
from msformer.presets import PUBLISHED
from msformer.segmentation import order_by_area
from studies.presets import CHANGES, main, standardised, stretched, variant, whitened
from tests.msformer.evaluation import data

IMAGE = prepare_image(data.lesion(data.disc(36, 40, 9)))
TASK = Task(IMAGE, True, 0, torch.device("cpu"))


def test_names_are_joined() -> None:
    found = variant("standardised+margin+seed-2+lab", 129)
    assert (found.size, found.margin, found.seed) == (129, 8, 2)
    assert [change.__name__ for change in found.prepare] == ["standardised", "lab"]
    assert variant("size-97", 129).size == 97
    with pytest.raises(ValueError, match="unknown variant 'best'"):
        variant("margin+best", 129)


@pytest.mark.parametrize(("name", "change"), [("published", {}), ("margin", {"margin": 8}), ("icnr", {"icnr": True})])
def test_the_fit_is_that_of_segment(name: str, change: dict[str, Any]) -> None:
    found = replace(variant(name, 33), max_steps=4, embed_dim=8).label_map(TASK)
    settings = replace(PUBLISHED, size=33, max_steps=4, embed_dim=8, **change)
    expected = label_map(TASK, settings)
    assert (order_by_area(found.labels) == order_by_area(expected.labels)).all()
    assert found.steps == expected.steps


@pytest.mark.parametrize("name", sorted(set(CHANGES) - {"reference"}))
def test_every_variant_runs(name: str) -> None:
    found = replace(variant(name, 33), size=33, max_steps=2, embed_dim=6).label_map(TASK)
    assert found.labels.shape == (36, 40)


def test_changes_of_the_image() -> None:
    image = IMAGE * 0.3 + 0.2
    assert standardised(image).mean((1, 2)).abs().max() < 1e-5
    assert (stretched(image).min(), stretched(image).max()) == (0, 1)
    pixels = whitened(image).flatten(1).numpy()
    assert np.abs(np.corrcoef(pixels) - np.eye(3)).max() < 0.05


def test_a_table(tmp_path: Path) -> None:
    folder = data.make_isic(tmp_path / "isic")
    arguments = ["--data", str(folder), "--out", str(tmp_path / "out"), "--only", "depth-1+steps-10", "--at", "33"]
    result = CliRunner().invoke(main, [*arguments, "--base", "width-32+steps-10", "--every", "2"])
    assert result.exit_code == 0, result.output
    lines = (tmp_path / "out" / "study.md").read_text().splitlines()
    assert lines[0].endswith("layout isic")
    assert "| width-32+steps-10 |" in lines[4]
    assert "| +0.0 |" in lines[4] or "| +0.0 [+0.0, +0.0] |" in lines[4]
    assert "nan" not in lines[4]
    assert lines[5].startswith("| depth-1+steps-10 |")
    assert CliRunner().invoke(main, [*arguments[:-4], "--only", "best"]).exit_code == 2
