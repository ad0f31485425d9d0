"""The command line as a user sees it: files, resuming, interruption, bad input, a full disk."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import tifffile
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image as PILImage

import msformer.runs.execute
import msformer.runs.ways
import msformer_kernels as kernels
from msformer.cli import main
from msformer.demo import MEANING
from msformer.output import OutputError, complete_file, machine, prepare_folder
from msformer.scoring import dice
from tests.msformer.conftest import QUICK_OPTIONS
from tests.msformer.evaluation.data import chest, disc, lesion, lungs, save

Picture = NDArray[np.uint8]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def images(tmp_path: Path, picture: Picture) -> Path:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "b.bmp", "sub/a.png"):
        PILImage.fromarray(picture).save(folder / name)
    return folder


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_segment_a_folder(images: Path, tmp_path: Path, picture: Picture) -> None:
    out = tmp_path / "out"
    result = run("segment", images, "--out", out, *QUICK_OPTIONS)
    assert result.exit_code == 0, result.output
    expected = {
        f"{name}{suffix}" for name in ("a", "b", "sub/a") for suffix in (".json", ".labels.png", ".overlay.png")
    }
    assert files(out) == expected | {"contact-sheet.png", "report.html", "summary.json"}
    assert "[1/3] a:" in result.output
    assert "3 of 3 images" in result.output
    with PILImage.open(out / "a.labels.png") as labels:
        assert labels.size == (40, 48)
        assert labels.mode == "P"
        count = len(np.unique(np.asarray(labels)))
    summary = json.loads((out / "summary.json").read_text())
    assert [image["status"] for image in summary["images"]] == ["done"] * 3
    assert summary["images"][0]["labels"] == count
    assert summary["settings"]["size"] == 33
    assert summary["machine"]["torch"]


def test_presets(images: Path, tmp_path: Path) -> None:
    """What is not given is as the preset says, and the record says it all."""
    found = {}
    for preset in ("smooth", "published", "quick"):
        out = tmp_path / preset
        options = ["--preset", preset, *QUICK_OPTIONS, "--intra", "0.5", "--no-standardise"]
        assert run("segment", images / "a.png", "--out", out, *options).exit_code == 0
        found[preset] = json.loads((out / "a.json").read_text())["settings"]
    for name, margin in (("smooth", 8), ("published", 0), ("quick", 8)):
        assert found[name]["preset"] == name
        assert found[name]["icnr"] == (name != "published")
        assert (found[name]["margin"], found[name]["size"], found[name]["embed_dim"]) == (margin, 33, 6)
        assert found[name]["weights"] == {"ce": 1, "inter": 1.5, "intra": 0.5}
        assert (found[name]["min_labels"], found[name]["standardise"]) == (3, False)
    wrong = run("segment", images, "--out", tmp_path / "x", "--preset", "best")
    assert wrong.exit_code == 2
    assert "'best' is not one of 'smooth', 'published', 'quick'" in wrong.output


def test_done_images_are_skipped_until_something_changes(images: Path, tmp_path: Path, picture: Picture) -> None:
    out = tmp_path / "out"
    arguments = ("segment", images, "--out", out, *QUICK_OPTIONS)
    run(*arguments)
    again = run(*arguments)
    assert "3 of 3 images were already done" in again.output
    assert "[1/3]" not in again.output
    (out / "b.labels.png").unlink()
    PILImage.fromarray(255 - picture).save(images / "a.png")
    changed = run(*arguments)
    assert "1 of 3 images were already done" in changed.output
    assert "already done" not in run(*arguments, "--seed", 1).output
    assert "already done" not in run(*arguments, "--seed", 1, "--overwrite").output


def test_names_that_clash_do_not_overwrite_each_other(tmp_path: Path, picture: Picture) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, value in ((one, 0), (two, 90)):
        folder.mkdir()
        for suffix in ("png", "bmp"):
            PILImage.fromarray(picture // 2 + value).save(folder / f"x.{suffix}")
    result = run("segment", one, two, "--out", tmp_path / "out", *QUICK_OPTIONS)
    assert result.exit_code == 0, result.output
    records = [json.loads(p.read_text())["source"] for p in (tmp_path / "out").glob("x*.json")]
    assert len(set(records)) == 4
    # and in a later run, where the earlier image is not given
    later = run("segment", two / "x.bmp", "--out", tmp_path / "out", *QUICK_OPTIONS)
    assert later.exit_code == 0
    assert len({json.loads(p.read_text())["source"] for p in (tmp_path / "out").glob("x*.json")}) == 4


def test_names_of_the_run_itself_are_not_given_to_images(tmp_path: Path, picture: Picture) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    out.mkdir()
    (out / "probe").write_text("the user's own")
    for name in ("summary.png", "contact-sheet.png", "contact-sheet-1.png"):
        PILImage.fromarray(picture).save(images / name)
    assert run("segment", images, "--out", out, *QUICK_OPTIONS).exit_code == 0
    assert len(json.loads((out / "summary.json").read_text())["images"]) == 3
    expected = {
        f"{name}{suffix}"
        for name in ("summary-png", "contact-sheet", "contact-sheet-1")
        for suffix in (".json", ".labels.png", ".overlay.png")
    }
    assert files(out) == expected | {"summary.json", "contact-sheet.png", "report.html", "probe"}
    assert "3 of 3 images were already done" in run("segment", images, "--out", out, *QUICK_OPTIONS).output


def test_another_backend_is_another_result(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("segment", images / "b.bmp", "--out", tmp_path / "out", *QUICK_OPTIONS)
    monkeypatch.setenv("MSFORMER_BACKEND", "reference")
    run(*arguments)
    assert "1 of 1 images were already done" in run(*arguments, "--backend", "reference").output
    monkeypatch.delenv("MSFORMER_BACKEND")
    assert ("already done" in run(*arguments).output) == (len(kernels.available_backends()) == 1)


def test_several_at_once_give_what_one_at_a_time_gives(images: Path, tmp_path: Path, picture: Picture) -> None:
    PILImage.fromarray(picture[::-1].copy()).save(images / "flipped.png")
    (images / "broken.png").write_bytes(b"no image")
    outcomes = []
    for at_once in (1, 4):
        out = tmp_path / str(at_once)
        result = run("segment", images, "--out", out, "--at-once", at_once, *QUICK_OPTIONS)
        assert result.exit_code == 1
        assert "4 of 5 images" in result.output
        assert len(files(out)) == 4 * 3 + 3
        summary = json.loads((out / "summary.json").read_text())["images"]
        pixels = {path.name: path.read_bytes() for path in out.rglob("*.labels.png")}
        outcomes.append((pixels, [{k: v for k, v in image.items() if k != "seconds"} for image in summary]))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("at_once", [1, 3])
def test_an_error_of_the_run_ends_all_images(
    at_once: int, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def no_space(path: Path, content: Any) -> None:
        calls.append(path)
        raise OutputError("cannot write: no space left")

    monkeypatch.setattr(msformer.runs.execute, "write_json", no_space)
    result = run("segment", images, "--out", tmp_path / "out", "--at-once", at_once, *QUICK_OPTIONS)
    assert result.exit_code == 1
    assert "error: cannot write: no space left" in result.output
    assert len(calls) <= at_once


def test_broken_files_do_not_stop_the_others(images: Path, tmp_path: Path) -> None:
    (images / "a.png").write_bytes(b"no image")
    PILImage.fromarray(np.full((20, 20), 7, dtype=np.uint8)).save(images / "tiny.png")
    result = run("segment", images, "--out", tmp_path / "out", *QUICK_OPTIONS)
    assert result.exit_code == 1
    assert "a.png: not an image that can be read" in result.output
    assert "3 of 4 images" in result.output, "an image smaller than the fitted size is enlarged"
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert sorted(image["status"] for image in summary["images"]) == ["done", "done", "done", "failed"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["segment", "gone.png", "--out", "out"], 1, "error: gone.png: no such file or folder"),
        (["segment", ".", "--out", "out"], 1, "error: no images"),
        (["segment", "--out", "out"], 2, "Missing argument 'PATHS...'"),
        (["segment", "x.png"], 2, "Missing option '--out'"),
        (["segment", "x.png", "--out", "out", "--size", "20"], 2, "20 is not in the range x>=33"),
        (["segment", "x.png", "--out", "x.png"], 1, "error: cannot make the folder x.png"),
        (["segment", "x.png", "--out", "x.png/out"], 1, "error: cannot make the folder x.png/out"),
        (["segment", "x.png", "--out", "out", "--backend", "tpu"], 2, "'tpu' is not one of 'reference'"),
        (["segment", "x.png", "--out", "out", "--device", "warp"], 1, "device: 'warp' cannot be used"),
        (["segment", "x.png", "--out", "out", "--ce", "0", "--inter", "0", "--intra", "0"], 2, "switched off"),
        (["segment", "x.png", "--out", "out", "--size", "33", "--margin", "33"], 2, "expected less than the size, 33"),
        (["segment", "x.png", "--out", "out", "--learning-rate", "inf"], 2, "learning_rate: expected a positive"),
        (["segment", "x.png", "--out", "out", "--seed", "-1"], 2, "-1 is not in the range 0<=x<=4294967295"),
        (["demo", "--seed", "4294967296"], 2, "4294967296 is not in the range"),
        (["segment", "x.png", "--out", "out", "--threads", "2"], 2, "--threads is for --cluster, which is not given"),
        (
            ["segment", "x.png", "--out", "out", "--cluster", "here"],
            2,
            "cluster: expected auto or HOST:PORT, got 'here'",
        ),
        (["sgement"], 2, "No such command 'sgement'"),
    ],
)
def test_errors_of_usage(
    arguments: list[str], code: int, message: str, tmp_path: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "x.png" in arguments:
        PILImage.fromarray(picture).save("x.png")
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert message in result.output
    assert "Traceback" not in result.output


def test_output_folder_that_cannot_be_written_to(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, data: bytes) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    result = run("segment", images, "--out", tmp_path / "out", *QUICK_OPTIONS)
    assert result.exit_code == 1
    assert "error: cannot write" in result.output
    assert "Permission denied" in result.output


def test_disk_full_while_writing(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    saved: list[Path] = []
    original = Path.write_bytes

    def fill_up(self: Path, content: bytes) -> int:
        saved.append(self)
        if len(saved) == 5:  # the overlay of the second image; the first was to see whether there is a folder
            original(self, content[: len(content) // 2])
            raise OSError(28, "No space left on device")
        return original(self, content)

    monkeypatch.setattr(Path, "write_bytes", fill_up)
    result = run("segment", images, "--out", out, *QUICK_OPTIONS)
    assert result.exit_code == 1
    assert "b.overlay.png: No space left on device" in result.output
    assert files(out) == {"a.json", "a.labels.png", "a.overlay.png", "b.labels.png"}
    monkeypatch.undo()
    again = run("segment", images, "--out", out, *QUICK_OPTIONS)
    assert again.exit_code == 0
    assert "1 of 3 images were already done" in again.output


def test_ctrl_c_keeps_what_is_done(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = msformer.runs.ways.segment
    calls = []

    def interrupted(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(msformer.runs.ways, "segment", interrupted)
    result = run("segment", images, "--out", tmp_path / "out", *QUICK_OPTIONS)
    assert result.exit_code == 130
    assert "interrupted; finished images are complete" in result.output
    assert files(tmp_path / "out") == {"a.json", "a.labels.png", "a.overlay.png"}


@pytest.mark.parametrize(("how", "at_once"), [(signal.SIGINT, 1), (signal.SIGKILL, 1), (signal.SIGINT, 3)])
def test_a_killed_process_can_be_resumed(how: signal.Signals, at_once: int, tmp_path: Path, picture: Picture) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for number in range(13):
        PILImage.fromarray(picture).save(images / f"{number:02d}.png")
    command = [sys.executable, "-m", "msformer", "segment", str(images), "--out", str(out), *QUICK_OPTIONS]
    command += ["--at-once", str(at_once)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # tests that run in the background of a shell ignore it, and so would the process
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 150
    while not list(out.glob("0*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(how)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -how), output
    done = len(list(out.glob("*.json")))
    assert 0 < done < 13
    for path in out.glob("[0-9]*.png"):
        with PILImage.open(path) as image:
            image.load()
    result = run("segment", images, "--out", out, *QUICK_OPTIONS)
    assert result.exit_code == 0, result.output
    assert f"{done} of 13 images were already done" in result.output
    assert not [name for name in files(out) if Path(name).name.startswith(".")]
    assert len([name for name in files(out) if name.startswith("contact-sheet-")]) == 3


def test_demo(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    result = run("demo", "--out", out, "--count", 2, *QUICK_OPTIONS)
    assert result.exit_code == 0, result.output
    columns = ("Dice coefficient", "blind: the mask", "oracle: best label", "floor: everything")
    assert re.search(".*".join(columns), result.output, re.DOTALL)
    assert MEANING in " ".join(result.output.split())
    scores = json.loads((out / "summary.json").read_text())["scores"]
    found, truth = (
        np.asarray(PILImage.open(out / path)) > 0 for path in ("lesion-0-01.mask.png", "masks/lesion-0-01.png")
    )
    assert scores["lesion-0-01"]["blind"] == dice(found, truth)
    assert set(scores) == {"lesion-0-01", "lesion-0-02"}
    assert all(0 <= value <= 1 for found in scores.values() for value in found.values())
    assert {"images/lesion-0-01.png", "masks/lesion-0-02.png", "contact-sheet.png"} <= files(out)
    assert "2 of 2 images were already done" in run("demo", "--out", out, "--count", 2, *QUICK_OPTIONS).output


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from msformer.cli import main; main(['--help'], standalone_mode=False); "
        "print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "False"


def test_complete_file_leaves_the_old_one_on_failure(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), complete_file(path) as temporary:
        temporary.write_text(str(1 / 0))
    with pytest.raises(OutputError, match=r"cannot write .*a\.txt: Is a directory"), complete_file(path) as temporary:
        raise IsADirectoryError(21, "Is a directory")
    assert path.read_text() == "old"
    assert files(tmp_path) == {"a.txt"}


def test_leftovers_that_nobody_writes_are_removed(tmp_path: Path) -> None:
    """At once where the machine says so, those of other machines and older versions after an hour."""
    random = "0123456789ab"
    names = {name: f".msformer-host-{name}-{random}" for name in (machine(), "0a0a0a0a", "0b0b0b0b")}
    names |= {"12345": f".msformer-12345-{random}", "12346": ".msformer-12346-probe"}
    for name in names.values():
        (tmp_path / name).touch()
    for old in ("0a0a0a0a", "12345", "12346"):
        os.utime(tmp_path / names[old], (time.time() - 3700,) * 2)
    with complete_file(tmp_path / "a.png") as temporary:
        temporary.write_text("half")
        prepare_folder(tmp_path)
        assert files(tmp_path) == {names["0b0b0b0b"], temporary.name}
    assert files(tmp_path) == {names["0b0b0b0b"], "a.png"}


def test_masks(tmp_path: Path) -> None:
    truth = disc(60, 70, 16)
    save(tmp_path / "images" / "läsion 1.png", lesion(truth))
    out = tmp_path / "out"
    options = ["--size", "41", "--max-steps", "12", "--embed-dim", "12", "--depth", "1"]
    result = run("segment", tmp_path / "images", "--out", out, "--mask", *options)
    assert result.exit_code == 0, result.output
    with PILImage.open(out / "läsion 1.mask.png") as mask:
        pixels = np.asarray(mask)
    assert pixels.shape == truth.shape
    assert set(np.unique(pixels)) == {0, 255}
    assert dice(pixels > 0, truth) > 0.8
    assert json.loads((out / "läsion 1.json").read_text())["rule"] == "lesion"
    (out / "läsion 1.mask.png").unlink()
    again = run("segment", tmp_path / "images", "--out", out, "--mask", *options)
    assert "already done" not in again.output
    assert (out / "läsion 1.mask.png").exists()


def test_the_rule_follows_the_kind_of_image(tmp_path: Path) -> None:
    folder, out = tmp_path / "images", tmp_path / "out"
    save(folder / "photo.png", lesion(disc(60, 70, 16)))
    save(folder / "grey.png", lesion(disc(60, 70, 16))[..., 0])
    tifffile.imwrite(folder / "chest-ct.tif", chest(lungs(64)))
    write_dicom(folder / "slice", chest(lungs(64)))
    options = ["--size", "41", "--max-steps", "2", "--embed-dim", "6", "--depth", "1", "--window", "-512", "512"]
    result = run("segment", folder, "--out", out, "--mask", *options)
    assert result.exit_code == 0, result.output
    rules = {path.stem: json.loads(path.read_text()).get("rule") for path in out.glob("*.json")}
    assert rules == {"photo": "lesion", "grey": "central", "chest-ct": "lung", "slice": "lung", "summary": None}
    result = run("segment", folder, "--out", out, "--mask", "--select", "central", *options)
    assert json.loads((out / "photo.json").read_text())["rule"] == "central"
    usage = run("segment", folder, "--out", out, "--select", "dark")
    assert usage.exit_code == 2
    assert "--select is for --mask" in usage.output


def test_dicom_and_nifti(tmp_path: Path) -> None:
    """Windowed, and written back on the voxels of the input."""
    folder, out = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    values = chest(lungs(64))
    affine = np.array([[-2.0, 0, 0, 10], [0, -3, 0, 20], [0, 0, 5, -30], [0, 0, 0, 1]])
    volume = np.stack([np.zeros_like(values), values.T, np.zeros_like(values)], axis=2)
    nibabel.save(nibabel.Nifti1Image(volume, affine), folder / "chest.nii.gz")
    write_dicom(folder / "slice", values)
    options = ["--size", "40", "--max-steps", "2", "--embed-dim", "6", "--depth", "1"]
    given = ["--select", "lung", "--window", "-600", "600", "--modality", "ct"]
    result = run("segment", folder, "--out", out, "--mask", *given, *options)
    assert result.exit_code == 0, result.output
    endings = (".json", ".labels.png", ".labels.nii.gz", ".mask.png", ".mask.nii.gz", ".overlay.png")
    expected = {f"{name}{ending}" for name in ("chest", "slice") for ending in endings}
    assert files(out) == expected | {"contact-sheet.png", "report.html", "summary.json"}
    record = json.loads((out / "chest.json").read_text())
    assert record["settings"] | {"window": [-600, 600], "slice": None, "modality": "CT"} == record["settings"]
    how = {"modality": "CT", "modality_source": "the user", "window": [-600, 600], "window_source": "the user"}
    assert record["read"] == how | {"index": 1, "count": 3, "notes": []}
    assert json.loads((out / "slice.json").read_text())["read"]["modality_source"] == "the file"
    written = nibabel.load(out / "chest.labels.nii.gz")
    assert written.shape == volume.shape
    np.testing.assert_allclose(written.affine, affine)
    labels = np.asarray(written.dataobj)
    with PILImage.open(out / "chest.labels.png") as shown:
        np.testing.assert_array_equal(labels[..., 1].T, np.asarray(shown).astype(int) + 1)
    assert not labels[..., [0, 2]].any()
    assert nibabel.load(out / "slice.mask.nii.gz").shape == (64, 64, 1)
    assert "3 of" not in run("segment", folder, "--out", out, "--slice", "1", *options).output
    wrong = run("segment", folder / "chest.nii.gz", "--out", tmp_path / "other", "--slice", "3", *options)
    assert wrong.exit_code == 1
    assert "expected a slice index from 0 to 2, got 3" in wrong.output


def test_all_slices_of_a_volume(tmp_path: Path) -> None:
    """Each an image of its own, resumed one by one; together one volume. Other files are as they were."""
    folder, out = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    volume = np.stack([np.roll(chest(lungs(48)), 5 * i, axis=0).T for i in range(3)], axis=2)
    volume[..., 1] += 200
    affine = np.diag([-2.0, -3, 5, 1])
    nibabel.save(nibabel.Nifti1Image(volume, affine), folder / "chest.nii.gz")
    write_dicom(folder / "slice", volume[..., 0].T)
    (folder / "broken.nii").write_bytes(b"no volume")
    options = ["--out", out, "--slice", "all", "--mask", "--select", "lung", *QUICK_OPTIONS]
    result = run("segment", folder, *options)
    assert result.exit_code == 1
    assert "broken.nii" in result.output
    assert "4 of 5 images" in result.output
    names = [f"chest-slice-{i:03d}" for i in range(3)]
    endings = (".json", ".labels.png", ".mask.png", ".overlay.png")
    expected = {f"{name}{ending}" for name in [*names, "slice"] for ending in endings}
    volumes = {f"{name}.{kind}.nii.gz" for name in ("chest", "slice") for kind in ("labels", "mask")}
    assert files(out) == expected | volumes | {"contact-sheet.png", "report.html", "summary.json"}
    for kind, first in (("labels", 1), ("mask", 0)):
        written = nibabel.load(out / f"chest.{kind}.nii.gz")
        np.testing.assert_allclose(written.affine, affine)
        for i, name in enumerate(names):
            with PILImage.open(out / f"{name}.{kind}.png") as picture:
                shown = np.asarray(picture) // (1 if kind == "labels" else 255)
            np.testing.assert_array_equal(np.asarray(written.dataobj)[..., i].T, shown + first)
    assert len({(out / f"{name}.labels.png").read_bytes() for name in names}) == 3, "three different slices"
    again = run("segment", folder, *options)
    assert "4 of 5 images were already done" in again.output
    usage = run("segment", folder, "--out", out, "--slice", "every")
    assert usage.exit_code == 2
    assert "'every' is not a valid integer range" in usage.output


def write_dicom(path: Path, values: NDArray[np.int16]) -> None:
    """A CT slice without a suffix."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = pydicom.uid.CTImageStorage, pydicom.uid.generate_uid()
    dataset.Modality, dataset.PhotometricInterpretation = "CT", "MONOCHROME2"
    dataset.Rows, dataset.Columns = values.shape
    dataset.SamplesPerPixel, dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 1, 16, 16, 15
    dataset.PixelRepresentation, dataset.RescaleSlope, dataset.RescaleIntercept = 0, 1, -1024
    dataset.PixelData = (values + 1024).astype(np.uint16).tobytes()
    dataset.save_as(path, enforce_file_format=True)


def test_a_window_that_is_none(images: Path, tmp_path: Path) -> None:
    for low, high in (("5", "5"), ("0", "inf"), ("nan", "1")):
        result = run("segment", images, "--out", tmp_path / "out", "--window", low, high, *QUICK_OPTIONS)
        assert result.exit_code == 2
        assert "--window" in result.output
        assert f"expected two numbers, the lower first, got {low} and {high}" in result.output
