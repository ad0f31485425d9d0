"""From a folder of images to a model: `msformer.train` and the command."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image as PILImage

import msformer
import msformer.training.batches
from msformer.cli import main
from msformer.io.prepare import prepare_image
from msformer.io.read import Reading
from msformer.output import OutputError
from msformer.runs.plan import Job
from msformer.scoring import dice
from msformer.synthetic import synthetic_lesion
from msformer.training import lessons
from msformer.training.domains import DERMOSCOPY
from msformer.training.folder import concerns
from msformer.training.kinds import Kind
from msformer.training.lessons import Lesson, Request, learn, make_pool
from msformer.training.predict import predict
from tests.msformer.training.small import OPTIONS, save_lesions

SKIN = Kind(colour=True, ct=False)
QUICK: dict[str, Any] = {"steps": 20, "batch": 2, "embed_dim": 6, "workers": 1, "device": "cpu", "progress": False}


def command(*arguments: str | Path) -> Any:
    return CliRunner().invoke(main, ["train", *map(str, arguments)])


def requests(folder: Path, **changes: Any) -> list[Request]:
    settings: dict[str, Any] = {"reading": Reading(), "domain": DERMOSCOPY, "taught": True, "seed": 0, **changes}
    return [Request(Job(path, path.stem), **settings) for path in sorted(folder.glob("*.png"))]


def test_a_net_learns_from_rules_what_the_rules_know(tmp_path: Path) -> None:
    """Some images without a mask, two hundred steps: the network finds lesions that it never saw."""
    save_lesions(tmp_path / "images", 12, 128)
    model = msformer.train(
        tmp_path / "images",
        tmp_path / "model",
        steps=150,
        batch=4,
        embed_dim=16,
        workers=1,
        device="cpu",
        progress=False,
    )
    scores = []
    for number in range(100, 106):
        lesion = synthetic_lesion(number, 128, 128)
        scores.append(dice(predict(model, prepare_image(lesion.image), gate="net").mask, lesion.mask))
    assert np.mean(scores) > 0.8, scores
    assert model.training["images"] == 12
    assert model.training["final agreement with the targets"] > 0.8


def test_the_command_leaves_a_model_with_a_report(tmp_path: Path) -> None:
    save_lesions(tmp_path / "images", 3)
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    (tmp_path / "images" / "02.png").rename(tmp_path / "images" / "<b>.png")
    found = command(tmp_path / "images", "--out", tmp_path / "model", *OPTIONS)
    assert found.exit_code == 0, found.output
    assert "domain: dermoscopy, as most images look" in found.output
    assert "warning: 3 images are few" in found.output
    assert "warning: 1 file cannot be read, and left out: " in found.output
    assert re.search(r"step 20/20: loss \d\.\d+, agreement \d+\.\d %, data \d+ % of the time", found.output)
    model = msformer.load(tmp_path / "model", device="cpu")
    assert (model.domain, model.objective) == ("dermoscopy", "teacher")
    assert model.training["settings"]["steps"] == 20
    page = (tmp_path / "model" / "report.html").read_text()
    assert page.count("<figure>") == 3
    assert "<svg" in page
    assert "&lt;b&gt;</bdi>: agreement" in page
    assert "<b>" not in page
    assert "3 images are few" in page
    assert 'http-equiv="refresh"' not in page


def test_the_same_command_goes_on_and_another_is_refused(tmp_path: Path) -> None:
    save_lesions(tmp_path / "images", 3)
    first = [tmp_path / "images", "--out", tmp_path / "model", *OPTIONS]
    assert command(*first).exit_code == 0
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    again = command(*first)
    assert again.exit_code == 0
    assert "goes on after step 20" in again.output
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == weights
    other = command(*first, "--seed", "1")
    assert other.exit_code == 1
    assert "seed was 0, now 1" in other.output
    (tmp_path / "images" / "00.png").rename(tmp_path / "images" / "new.png")
    renamed = command(*first)
    assert "1 of the images used is new, such as new; 1 of the images used is gone, such as 00" in renamed.output
    anew = command(*first, "--seed", "1", "--overwrite")
    assert anew.exit_code == 0
    assert (tmp_path / "model" / "model.safetensors").read_bytes() != weights


def test_a_signal_keeps_what_was_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM in the middle, then the same command: the weights of a training that nobody stopped."""
    save_lesions(tmp_path / "images", 3)
    options = {**QUICK, "steps": 30}
    msformer.train(tmp_path / "images", tmp_path / "whole", **options)
    make, handler = msformer.training.batches.Batches.make, signal.getsignal(signal.SIGTERM)

    def stopped(self: Any, step: int) -> Any:
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return make(self, step)

    with monkeypatch.context() as changed:
        changed.setattr("msformer.training.batches.Batches.make", stopped)
        with pytest.raises(KeyboardInterrupt):
            msformer.train(tmp_path / "images", tmp_path / "model", **options)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert not (tmp_path / "model" / "model.json").exists()
    assert 'http-equiv="refresh"' in (tmp_path / "model" / "report.html").read_text()
    msformer.train(tmp_path / "images", tmp_path / "model", **options)
    found, expected = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "whole"))
    assert found == expected


def test_a_second_round_is_taught_by_the_first(tmp_path: Path) -> None:
    save_lesions(tmp_path / "images", 4)
    options = {**QUICK, "steps": 30, "learning_rate": 1e-2, "embed_dim": 8, "batch": 4}
    once = msformer.train(tmp_path / "images", tmp_path / "model", **options)
    twice = msformer.train(tmp_path / "images", tmp_path / "model", rounds=2, **options)
    assert once.digest != twice.digest
    at_once = msformer.train(tmp_path / "images", tmp_path / "other", rounds=2, **options)
    assert at_once.digest == twice.digest
    with pytest.raises(ValueError, match="is in round 2, expected as many at least, got 1; take another folder"):
        msformer.train(tmp_path / "images", tmp_path / "model", **options)
    (tmp_path / "model" / "model.json").unlink()
    (tmp_path / "model" / "report.html").unlink()
    again = msformer.train(tmp_path / "images", tmp_path / "model", rounds=2, **options)
    assert again.digest == twice.digest, "what is gone is written again"
    assert "msformer.train, in Python" in (tmp_path / "model" / "report.html").read_text()


@pytest.mark.parametrize("objective", ["consistency", "published"])
def test_objectives_without_teachers(tmp_path: Path, objective: str) -> None:
    save_lesions(tmp_path / "images", 2)
    found = command(tmp_path / "images", "--out", tmp_path / "model", "--objective", objective, *OPTIONS)
    assert found.exit_code == 0, found.output
    assert "agreement" not in found.output
    model = msformer.load(tmp_path / "model", device="cpu")
    assert model.network.num_clusters == {"consistency": 8, "published": 32}[objective]
    assert model.training["final agreement with the targets"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "ce"], "expected terms, each once, with weights, such as ce=1,dice=0.5, got 'ce'"),
        (["--weights", "ce=1,ce=2"], "expected terms, each once"),
        (["--weights", "inter=1"], "weights: teacher has no inter; expected some of ce, dice"),
        (["--batch", "3", "--accumulate", "2"], "batch: expected a multiple of 2"),
        (["--objective", "published", "--rounds", "2"], "rounds: 2 are for the objective teacher, got published"),
        (["--learning-rate", "inf"], "learning_rate: expected a positive number, got inf"),
        (["--learning-rate", "nan"], "learning_rate: expected a positive number, got nan"),
        (["--backend", "other"], "other"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_bad_settings_are_errors_before_anything_is_read(
    tmp_path: Path, options: list[str], message: str, more: list[str]
) -> None:
    found = command(tmp_path, "--out", tmp_path / "model", *options, *more)
    assert found.exit_code == 2
    assert message in found.output
    assert not (tmp_path / "model").exists()


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    found = command(tmp_path / "images", "--out", tmp_path / "model", *OPTIONS)
    assert found.exit_code == 1
    assert "no images" in found.output


def test_teachers_that_disagree_everywhere_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(2):
        random = np.random.default_rng(number)
        PILImage.fromarray(random.integers(0, 255, (64, 64, 3)).astype(np.uint8)).save(
            tmp_path / "images" / f"{number}.png"
        )
    found = command(tmp_path / "images", "--out", tmp_path / "model", *OPTIONS)
    assert found.exit_code == 1
    assert "the teachers of dermoscopy disagree on all of 2 images" in found.output


def some_lessons(count: int, kind: Kind = SKIN, **changes: Any) -> dict[str, Lesson]:
    votes = np.zeros((4, 4), np.uint8)
    votes[1:3, 1:3] = 6
    lesson = Lesson(np.zeros((3, 4, 4), np.uint8), votes, 6, 1.0, kind, "")._replace(**changes)
    return {f"{kind}-{n}": lesson._replace(key=changes.get("key", f"{kind}-{n}")) for n in range(count)}


def test_concerns_say_what_to_do_instead() -> None:
    skin, grey = some_lessons(60), some_lessons(10, Kind(False, False))
    assert list(concerns(DERMOSCOPY, skin, skin, {})) == []
    kept = dict(list(skin.items())[:20])
    few, split, mixed = concerns(DERMOSCOPY, skin | grey, kept, {})
    assert few.startswith("20 images are few")
    assert split.startswith("The teachers disagree on 50 of 70 images")
    assert mixed.startswith("10 of 70 images, such as grey-0, are not colour as most are")


def test_images_that_are_copies_or_blank_are_a_concern() -> None:
    same = some_lessons(60, key="same")
    copies, few = concerns(DERMOSCOPY, same, same, {})
    assert copies.startswith("59 of 60 images are copies of others")
    assert few.startswith("1 images are few")
    blank = some_lessons(60, votes=np.zeros((4, 4), np.uint8))
    (seen,) = concerns(DERMOSCOPY, blank, blank, {})
    assert seen.startswith("In 60 of 60 images, such as colour-0, the teachers see nothing or everything")


def test_files_that_cannot_be_read_are_named() -> None:
    skin = some_lessons(60)
    (unread,) = concerns(DERMOSCOPY, skin, skin, {f"{n}.png": f"{n}.png: damaged" if n else "NaN" for n in range(12)})
    assert unread.startswith("12 files cannot be read, and left out: 0.png: NaN; 1.png: damaged; ")
    assert unread.endswith("; 9.png: damaged; and 2 more")


def test_lessons_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_lesions(tmp_path / "images", 3)
    made: list[str] = []
    make = lessons.make_lesson

    def counted(request: Request, folder: Path) -> Any:
        made.append(request.job.name)
        return make(request, folder)

    monkeypatch.setattr(lessons, "make_lesson", counted)
    folder = tmp_path / "lessons"
    folder.mkdir()
    first, failures = learn(requests(tmp_path / "images"), folder, lambda done: None)
    assert (made, failures) == (["00", "01", "02"], {})
    made.clear()
    sorted(folder.iterdir())[0].write_bytes(b"damaged")
    again, _ = learn(requests(tmp_path / "images"), folder, lambda done: None)
    assert len(made) == 1
    assert all(np.array_equal(first[name].votes, again[name].votes) for name in first)
    assert torch.equal(make_pool(first).target, make_pool(again).target)
    made.clear()
    learn(requests(tmp_path / "images", seed=1), folder, lambda done: None)
    assert len(made) == 3


def test_lessons_that_cannot_be_kept_end_the_run(tmp_path: Path) -> None:
    """A full disk is no reason to leave images out."""
    save_lesions(tmp_path / "images", 2, 64)
    with pytest.raises(OutputError, match=r"cannot write .*"):
        learn(requests(tmp_path / "images"), tmp_path / "images" / "00.png", lambda done: None)


def test_workers_make_the_same_lessons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_lesions(tmp_path / "images", 3, 64)
    monkeypatch.setattr(lessons, "FEW", 0)
    done: list[int] = []
    pools = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        found, _ = learn(requests(tmp_path / "images"), folder, done.append, workers=workers)
        pools.append(make_pool(found))
    assert done == [0, 1, 2, 3] * 2
    assert torch.equal(pools[0].target, pools[1].target)
    assert torch.equal(pools[0].weight, pools[1].weight)
    assert pools[0].target.float().mean() > 0.02
