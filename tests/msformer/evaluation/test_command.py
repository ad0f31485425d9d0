"""``msformer evaluate`` as a user sees it: the report, resuming, failures, bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from click.testing import CliRunner, Result

import msformer.baselines.otsu as otsu
from msformer.baselines import LabelMap, Method, Task, all_methods
from msformer.cli import main
from msformer.evaluation import command
from msformer.evaluation.protocols import PROTOCOLS
from msformer_kernels.core.backends import resolve
from tests.msformer.commands.events import events, of_kind
from tests.msformer.evaluation import data

FAST = "everything, otsu, kmeans-2"


def evaluate(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["evaluate", "--size", "40", *(str(a) for a in arguments)])


def test_a_report(tmp_path: Path) -> None:
    data.make_pairs(tmp_path / "data")
    out = tmp_path / "out"
    arguments = ("--data", tmp_path / "data", "--methods", FAST, "--out", out)
    result = evaluate(*arguments, "--json")
    assert result.exit_code == 0, result.output
    assert {"report.html", "report.md", "summary.csv", "scores.csv", "run.json", "maps"} == {
        p.name for p in out.iterdir()
    }
    scores = pd.read_csv(out / "scores.csv")
    assert len(scores) == 3 * 3 * len(PROTOCOLS)
    summary = pd.read_csv(out / "summary.csv").set_index(["protocol", "method"])
    chosen = scores[(scores.protocol == "blind") & (scores.method == "otsu")]
    assert summary.loc[("blind", "otsu"), "dsc"] == pytest.approx(chosen.dsc.mean())
    assert summary.loc[("blind", "otsu"), "dsc"] > 0.95
    assert summary.loc[("published", "everything"), "dsc"] > summary.loc[("oracle", "everything"), "dsc"]
    text = (out / "report.md").read_text()
    for heading in (
        "Blind: labels chosen without the mask, by the rule lesion",
        "Oracle: the one label",
        "within the mask dilated by 6",
    ):
        assert heading in text
    assert "| Otsu | 9" in text
    assert "layout pairs, 3 images" in text
    assert "3 images in" in result.stderr
    told = events(result)
    maps = of_kind(told, "map")
    assert [(each["image"], each["status"]) for each in maps[:4]] == [("a", "done")] * 3 + [("b", "done")]
    assert maps[1]["scores"]["blind"]["dsc"] == pytest.approx(chosen.dsc.iloc[0])
    assert json.loads((out / "maps" / "otsu" / "a.json").read_text()) == maps[1]["record"]
    assert maps[1]["record"]["read"] == {"modality": "", "modality_source": "", "notes": [], "masks": []}
    assert told[-1]["counts"] == {"images": 3, "maps": 9, "done": 9, "skipped": 0, "failed": 0}
    assert {line["protocol"] for line in told[-1]["summary"]} == set(PROTOCOLS)
    assert "would make 0 of 9 label maps" in evaluate(*arguments, "--dry-run").output
    assert "left" in result.output, "the time left is said"


def test_nothing_is_fitted_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data.make_pairs(tmp_path / "data")
    arguments = ("--data", tmp_path / "data", "--methods", FAST, "--out", tmp_path / "out")
    assert evaluate(*arguments).exit_code == 0
    first = (tmp_path / "out" / "scores.csv").read_bytes()
    monkeypatch.setattr(command.Store, "fit", None)
    again = evaluate(*arguments)
    assert again.exit_code == 0, again.output
    assert "9 of 9 label maps were already done" in again.output
    assert (tmp_path / "out" / "scores.csv").read_bytes() == first
    monkeypatch.undo()
    assert "6 of 9 label maps were already done" in evaluate_after_change(tmp_path).output
    other_seed = evaluate(*arguments, "--seed", 1)
    assert "already done" not in other_seed.output


def evaluate_after_change(folder: Path) -> Result:
    data.save(folder / "data" / "images" / "b.png", data.lesion(data.disc(), 77))
    return evaluate("--data", folder / "data", "--methods", FAST, "--out", folder / "out")


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    data.make_pairs(tmp_path / "data", tuple("abcde"))
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "msformer",
        "evaluate",
        "--data",
        str(tmp_path / "data"),
        "--methods",
        "kmeans-3",
    ]
    process = subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 150
    while not list(out.glob("maps/kmeans-3/*.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(list(out.glob("maps/*/*.json")))
    assert 0 < done < 15
    done_by_runner = CliRunner().invoke(main, [*command[3:], "--out", str(out)])
    assert done_by_runner.exit_code == 0, done_by_runner.output
    assert f"{done} of 15 label maps were already done" in done_by_runner.output
    assert not list(out.rglob(".msformer-*"))
    assert len(pd.read_csv(out / "scores.csv")) == 15 * len(PROTOCOLS)


def test_a_run_killed_while_it_makes_a_map_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old record must not stand beside the new map."""
    data.make_pairs(tmp_path / "data", ("a",))
    arguments = ("--data", tmp_path / "data", "--methods", "otsu", "--out", tmp_path / "out")
    assert evaluate(*arguments).exit_code == 0
    first = pd.read_csv(tmp_path / "out" / "scores.csv").drop(columns="seconds")
    monkeypatch.setattr("msformer.evaluation.store.write_json", None)  # the run ends where the record is written
    assert evaluate(*arguments, "--size", 50).exit_code == 1
    monkeypatch.undo()
    again = evaluate(*arguments)
    assert "1 of 2 label maps were already done" in again.output, "that of the method that was not reached"
    assert pd.read_csv(tmp_path / "out" / "scores.csv").drop(columns="seconds").equals(first)


def test_a_damaged_map_is_made_again(tmp_path: Path) -> None:
    data.make_pairs(tmp_path / "data", ("a", "b"))
    arguments = ("--data", tmp_path / "data", "--methods", "otsu", "--out", tmp_path / "out")
    assert evaluate(*arguments).exit_code == 0
    damaged = tmp_path / "out" / "maps" / "otsu" / "a.png"
    whole = damaged.read_bytes()
    for content in (b"", whole[: len(whole) // 2]):
        damaged.write_bytes(content)
        again = evaluate(*arguments)
        assert again.exit_code == 0, again.output
        assert damaged.read_bytes() == whole


def test_the_backend_is_the_one_that_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def asks(task: Task) -> LabelMap:
        used.append(resolve(None, "cpu", torch.float32))
        return otsu.label_map(task)

    methods = [Method(m.name, m.title, m.order, asks) for m in all_methods()]
    monkeypatch.setattr("msformer.baselines.all_methods", lambda: tuple(methods))
    data.make_pairs(tmp_path / "data", ("a",))
    arguments = ("--data", tmp_path / "data", "--methods", "otsu", "--out", tmp_path / "out", "--backend", "reference")
    assert evaluate(*arguments).exit_code == 0
    assert set(used) == {"reference"}
    assert "backend reference" in (tmp_path / "out" / "report.md").read_text()


def test_results_below_the_data_are_not_data(tmp_path: Path) -> None:
    data.make_isic(tmp_path)
    arguments = ("--data", tmp_path, "--methods", "otsu", "--out", tmp_path / "report")
    for _ in range(2):
        result = evaluate(*arguments)
        assert result.exit_code == 0, result.output
        assert "left out" not in result.output


def test_a_window(tmp_path: Path) -> None:
    data.make_lung(tmp_path / "lung")
    shown = []
    for arguments in ((), ("--window", -2000, 5000)):
        out = tmp_path / f"out{len(arguments)}"
        result = evaluate("--data", tmp_path / "lung", "--methods", "otsu", "--out", out, *arguments)
        assert result.exit_code == 0, result.output
        record = json.loads((out / "maps" / "otsu" / "ID_0001_Z_0100.json").read_text())
        shown.append(record["settings"]["window"])
    assert shown == [[-512, 512], [-2000, 5000]]


def test_failures_are_named_and_do_not_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data.make_pairs(tmp_path / "data")
    (tmp_path / "data" / "images" / "a.png").write_bytes(b"no image")
    data.save(tmp_path / "data" / "masks" / "b.png", np.zeros((3, 3), np.uint8))

    def broken(task: Task) -> LabelMap:
        raise RuntimeError("the loss became nan")

    methods = [m if m.name != "kmeans-2" else Method(m.name, m.title, m.order, broken) for m in all_methods()]
    monkeypatch.setattr("msformer.baselines.all_methods", lambda: tuple(methods))
    result = evaluate("--data", tmp_path / "data", "--methods", FAST, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "failed: a: " in result.output
    assert "failed: b: " in result.output
    assert "the mask has 3 x 3 pixels, the image 40 x 48" in result.output
    assert "failed: c, k-means, k = 2: the loss became nan" in result.output
    assert set(pd.read_csv(tmp_path / "out" / "scores.csv").image) == {"c"}
    failures = json.loads((tmp_path / "out" / "run.json").read_text())["failures"]
    assert set(failures) == {"a", "b", "c, k-means, k = 2"}
    assert "## Failed" in (tmp_path / "out" / "report.md").read_text()


def test_an_image_that_does_not_fit_the_memory_is_a_failure_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def large(task: Task) -> LabelMap:
        raise MemoryError("cannot allocate")

    methods = [replace(m, label_map=large) if m.name == "kmeans-2" else m for m in all_methods()]
    monkeypatch.setattr("msformer.baselines.all_methods", lambda: tuple(methods))
    data.make_pairs(tmp_path / "data", ("a",))
    result = evaluate("--data", tmp_path / "data", "--methods", FAST, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "failed: a, k-means, k = 2: cannot allocate" in result.output
    assert "| k-means, k = 2 | - |" in (tmp_path / "out" / "report.md").read_text()


def test_empty_and_full_masks_and_odd_images(tmp_path: Path) -> None:
    folder = data.make_pairs(tmp_path / "data", ("läsion 1", "b", "c", "d"))
    data.save(folder / "masks" / "b.png", np.zeros((40, 48), np.uint8))
    data.save(folder / "masks" / "c.png", np.full((40, 48, 3), 255, np.uint8))
    data.save(folder / "images" / "d.png", np.full((1, 70, 4), 90, np.uint8))
    data.save(folder / "masks" / "d.png", np.arange(70, dtype=np.uint8)[None] // 35)
    result = evaluate("--data", folder, "--methods", FAST, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    summary = pd.read_csv(tmp_path / "out" / "summary.csv")
    assert (summary.empty_truths == 1).all()
    assert (summary.images == 4).all()
    assert (summary.dsc_count == np.where(summary.protocol == "blind", 4, 3)).all()
    assert "4 images, 1 of them without an object" in (tmp_path / "out" / "report.html").read_text()
    scores = pd.read_csv(tmp_path / "out" / "scores.csv")
    full = scores[(scores.image == "c") & (scores.method == "everything") & (scores.protocol == "blind")].iloc[0]
    found = scores[(scores.image == "b") & (scores.method == "everything")].set_index("protocol")
    assert found.dsc["blind"] == 0
    assert found.dsc.drop("blind").isna().all(), "they look at the mask, and would find nothing by looking"
    assert full.dsc == full.precision == full.recall == full.dsc_full == 1
    assert "(without 1)" in (tmp_path / "out" / "report.md").read_text()


def test_limit_and_rule_and_ablation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data.make_lung(tmp_path / "lung")
    data.make_isic(tmp_path / "isic")
    rules = {}
    for layout in ("lung", "isic"):
        out = tmp_path / f"out-{layout}"
        done = evaluate("--data", tmp_path / layout, "--methods", "otsu", "--limit", 1, "--out", out)
        assert done.exit_code == 0, done.output
        rules[layout] = json.loads((out / "run.json").read_text())["blind rule"]
        assert pd.read_csv(out / "scores.csv").image.nunique() == 1
        summary = pd.read_csv(out / "summary.csv").set_index(["protocol", "method"])
        assert set(summary.index.get_level_values("method")) == {"everything", "otsu"}, "the floors are always there"
        assert summary.dsc["blind", "otsu"] > 0.9
    assert rules == {"lung": "lung", "isic": "lesion"}

    def fast(task: Task) -> LabelMap:
        return otsu.label_map(task)

    methods = [Method(m.name, m.title, m.order, fast, m.tables) for m in all_methods()]
    monkeypatch.setattr("msformer.baselines.all_methods", lambda: tuple(methods))
    done = evaluate("--data", tmp_path / "isic", "--ablation", "--out", tmp_path / "table2")
    assert done.exit_code == 0, done.output
    titles = list(pd.read_csv(tmp_path / "table2" / "summary.csv").title.unique())
    variants = ["MS-Former, ce", "MS-Former, ce + inter", "MS-Former, ce + intra", "MS-Former, published"]
    assert titles == ["everything", "Otsu", *variants]


def test_labels_and_void(tmp_path: Path) -> None:
    folder, disc = data.make_pairs(tmp_path / "data", ("a", "b")), data.disc()
    ring = data.disc(radius=12) & ~disc
    for name, border in (("a", 2), ("b", 255)):
        data.save(folder / "images" / f"{name}.png", data.lesion(disc))
        data.save(folder / "masks" / f"{name}.png", (disc * 1 + ring * border).astype(np.uint8))
    arguments = ("--data", folder, "--methods", "otsu", "--select", "dark", "--out", tmp_path / "out")
    refused = evaluate(*arguments)
    assert refused.exit_code == 1, refused.output
    expected = "a.png: holds the labels 1, 2; say which is the object: --label 1, or all"
    assert expected in refused.stderr.replace("\n", "")
    assert not (tmp_path / "out").exists(), "nothing is made before"
    done = evaluate(*arguments, "--label", 1)
    assert done.exit_code == 0, done.output
    scores = pd.read_csv(tmp_path / "out" / "scores.csv").set_index(["image", "method", "protocol"])
    assert (scores.dsc[:, "otsu", "blind"] > 0.95).all()
    everything = scores.dsc[:, "everything", "blind"]
    assert everything["b"] > everything["a"] + 0.02, "void pixels are not found wrongly"
    assert "label: none of 2 masks has label 7" in evaluate(*arguments, "--label", 7).stderr.replace("\n", "")


def test_an_object_that_vanishes_is_not_an_empty_mask(tmp_path: Path) -> None:
    folder = data.make_pairs(tmp_path / "data", ("a", "b"))
    small = np.zeros((400, 480), bool)
    small[201, 203] = True
    data.save(folder / "images" / "b.png", data.lesion(small))
    data.save(folder / "masks" / "b.png", small.astype(np.uint8))
    result = evaluate("--data", folder, "--methods", "otsu", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "b.png: its 1 pixels vanish at 40 x 40; take a larger --size" in result.output
    assert set(pd.read_csv(tmp_path / "out" / "scores.csv").image) == {"a"}


def test_names_that_are_no_unicode(tmp_path: Path) -> None:
    folder = data.make_pairs(tmp_path / "data", ("a", "b", "c"))
    for kind, name in (("images", "b"), ("masks", "b"), ("images", "c")):
        os.rename(folder / kind / f"{name}.png", os.fsencode(folder / kind / name) + b"\xe4.png")
    arguments = ("--data", folder, "--methods", "otsu", "--out", tmp_path / "out")
    result = evaluate(*arguments)
    assert result.exit_code == 0, result.output
    assert set(pd.read_csv(tmp_path / "out" / "scores.csv").image) == {"a", "b\ufffd"}
    assert "c\ufffd.png: has no mask" in (tmp_path / "out" / "report.md").read_text()
    assert "4 of 4 label maps were already done" in evaluate(*arguments).output


def test_a_folder_for_each_patient(tmp_path: Path) -> None:
    for patient in ("p1", "p2"):
        data.save(tmp_path / "data" / "images" / patient / "1.png", data.lesion(data.disc()))
        data.save(tmp_path / "data" / "masks" / patient / "1.png", data.disc().astype(np.uint8))
    arguments = ("--data", tmp_path / "data", "--methods", "otsu", "--out", tmp_path / "out")
    assert evaluate(*arguments).exit_code == 0
    assert set(pd.read_csv(tmp_path / "out" / "scores.csv").image) == {"p1/1", "p2/1"}
    assert "4 of 4 label maps were already done" in evaluate(*arguments).output


def test_a_method_with_other_settings_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data.make_pairs(tmp_path / "data", ("a",))
    arguments = ("--data", tmp_path / "data", "--methods", "otsu", "--out", tmp_path / "out")
    assert evaluate(*arguments).exit_code == 0
    methods = [replace(m, settings="another") if m.name == "otsu" else m for m in all_methods()]
    monkeypatch.setattr("msformer.baselines.all_methods", lambda: tuple(methods))
    assert "1 of 2 label maps were already done" in evaluate(*arguments).output


def test_a_record_that_is_none(tmp_path: Path) -> None:
    data.make_pairs(tmp_path / "data", ("a",))
    arguments = ("--data", tmp_path / "data", "--methods", "otsu", "--out", tmp_path / "out")
    assert evaluate(*arguments).exit_code == 0
    for content in ("[]", "{}", "1", '{"settings": 3'):
        (tmp_path / "out" / "maps" / "otsu" / "a.json").write_text(content)
        result = evaluate(*arguments)
        assert result.exit_code == 0, result.output
        assert "1 of 2 label maps were already done" in result.output


def test_pairs_of_every_kind_have_the_rule_of_their_kind(tmp_path: Path) -> None:
    """That by which `msformer segment --mask` makes its masks, unless --select says otherwise."""
    folder = data.make_pairs(tmp_path / "data", ("photo",))
    for name, values, mask in (
        ("chest-ct", data.chest(data.lungs()), data.lungs()),
        ("bright", 50 + 150 * data.disc().astype(np.uint8), data.disc()),
    ):
        tifffile.imwrite(folder / "images" / f"{name}.tif", values)
        data.save(folder / "masks" / f"{name}.png", mask.astype(np.uint8) * 255)
    arguments = ("--data", folder, "--methods", "otsu", "--out", tmp_path / "out")
    result = evaluate(*arguments)
    assert result.exit_code == 0, result.output
    scores = pd.read_csv(tmp_path / "out" / "scores.csv")
    found = scores[(scores.method == "otsu") & (scores.protocol == "blind")].set_index("image")
    assert found.rule.to_dict() == {"photo": "lesion", "chest-ct": "lung", "bright": "central"}
    assert (found.dsc > 0.9).all()
    text = (tmp_path / "out" / "report.md").read_text()
    assert all(f"{rule} (1)" in text for rule in ("lesion", "lung", "central"))
    assert evaluate(*arguments, "--select", "central").exit_code == 0
    assert set(pd.read_csv(tmp_path / "out" / "scores.csv").rule) == {"central"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--methods", "unet"), 2, "methods: unknown 'unet'"),
        (("--select", "best"), 2, "'best' is not one of 'auto', 'central', 'dark', 'lesion', 'lung'"),
        (("--layout", "cityscapes"), 2, "'cityscapes' is not one of"),
        (("--label", "red"), 2, "label: expected a number"),
        (("--data", "nowhere"), 1, "nowhere: no such file or folder"),
        (("--device", "tpu"), 1, "device: 'tpu' cannot be used"),
        (("--ablation", "--methods", "otsu"), 2, "--ablation says which methods, got --methods 'otsu' as well"),
        (("--masks", "masks", "--layout", "lung"), 2, "--masks is for --layout pairs, got --layout lung"),
        (("--window", "5", "5"), 2, "expected two numbers, the lower first, got 5 and 5"),
    ],
)
def test_errors_of_usage(arguments: tuple[str, ...], code: int, message: str, tmp_path: Path) -> None:
    data.make_pairs(tmp_path / "data")
    result = evaluate("--data", tmp_path / "data", "--out", tmp_path / "out", *arguments)
    assert result.exit_code == code
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_methods_are_listed() -> None:
    result = evaluate("--methods", "list")
    assert result.exit_code == 0
    for method in all_methods():
        assert method.name in result.output


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.delitem(sys.modules, "msformer.evaluation.command")
    result = evaluate("--data", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "pandas is not installed; run: pip install 'msformer[evaluate]'" in result.output
