"""The study of the rules for masks, on images that the package draws."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from click.testing import CliRunner

from msformer.demo import make_images
from studies.rules import DRAWN, METHODS, main


def test_scores_and_differences(tmp_path: Path) -> None:
    make_images(tmp_path / "data", 2, 0)
    first = CliRunner().invoke(main, ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "a")])
    assert first.exit_code == 0, first.output
    scores = pd.read_csv(tmp_path / "a" / "scores.csv")
    assert len(scores) == 2 * len(DRAWN) * len(METHODS)
    assert scores[scores.images == "as they are"].dsc.min() > 80

    earlier = tmp_path / "earlier.csv"
    scores.assign(dsc=scores.dsc - 2).to_csv(earlier, index=False)
    options = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "b"), "--beside"]
    second = CliRunner().invoke(main, [*options, str(earlier)])
    assert "of 18 maps with something drawn 18 gain more than 1 point, 0 lose more; from +2 to +2" in second.output

    scores[1:].to_csv(earlier, index=False)
    third = CliRunner().invoke(main, [*options, str(earlier)])
    assert third.exit_code == 2
    assert "expected scores of the same 24 maps, found 23 of them" in third.output
