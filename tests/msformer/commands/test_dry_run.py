"""What a run would do is said, and nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from PIL import Image as PILImage

from tests.msformer.commands.events import events, of_kind
from tests.msformer.conftest import QUICK_OPTIONS
from tests.msformer.evaluation import data
from tests.msformer.test_cli import files, run
from tests.msformer.training.small import OPTIONS, save_lesions


def state(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}


def test_of_segment(tmp_path: Path, picture: NDArray[Any]) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    PILImage.fromarray(picture).save(images / "a.png")
    arguments = ("segment", images, "--out", out, "--mask", *QUICK_OPTIONS)
    shown = run(*arguments, "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert not out.exists()
    assert "a.png: would write a.labels.png, a.mask.png, a.overlay.png, a.json" in shown.output
    assert "size 33, max_steps 2" in shown.output
    assert "would segment 1 of 1 images" in shown.output
    promised = of_kind(events(run(*arguments, "--dry-run", "--json")), "image")[0]["files"]
    assert run(*arguments).exit_code == 0
    assert set(promised) == files(out) - {"report.html", "contact-sheet.png", "summary.json"}
    PILImage.fromarray(picture).save(images / "b.png")
    (images / ("c" * 250 + ".png")).write_bytes((images / "b.png").read_bytes())
    before = state(out)
    told = events(run(*arguments, "--dry-run", "--json"))
    assert state(out) == before
    assert told[0]["dry_run"]
    assert [each["status"] for each in of_kind(told, "image")] == ["would skip", "would run", "would fail"]
    assert told[-1]["counts"] == {"images": 3, "done": 1, "skipped": 1, "failed": 1}
    assert told[-1]["exit_code"] == 1


def test_of_evaluate(tmp_path: Path) -> None:
    data.make_pairs(tmp_path / "data", ("a", "b"))
    out = tmp_path / "out"
    arguments = ("evaluate", "--data", tmp_path / "data", "--methods", "otsu", "--size", 40, "--out", out)
    shown = run(*arguments, "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert "would make 4 of 4 label maps of 2 images" in shown.output
    assert not out.exists()
    told = events(run(*arguments, "--dry-run", "--json"))
    assert [each["methods"] for each in of_kind(told, "image")] == [["everything", "otsu"]] * 2


def test_of_train(tmp_path: Path) -> None:
    save_lesions(tmp_path / "images", 2)
    out = tmp_path / "model"
    arguments = ("train", tmp_path / "images", "--out", out, *OPTIONS)
    shown = run(*arguments, "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert "would train on 2 images from step 0 to 20" in shown.output
    assert "domain dermoscopy" in shown.output
    assert not out.exists()
    wrong = run(*arguments, "--dry-run", "--weights", "cherries=1")
    assert wrong.exit_code == 2
    assert "--weights" in wrong.output
