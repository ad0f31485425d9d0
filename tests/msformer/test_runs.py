"""Names and files of a run over many images, where inputs are awkward: links, volumes, odd names, odd sizes."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image as PILImage

from msformer.pictures import SheetRow, contact_sheet, indexed_png, read_labels, small_row, write_png
from msformer.progress import RunProgress
from msformer.runs.plan import plan_jobs
from tests.msformer.conftest import QUICK_OPTIONS
from tests.msformer.evaluation.data import chest, disc, lesion, lungs, save
from tests.msformer.test_cli import files, run, write_dicom

AFFINE = np.diag([-1.0, -1, 2, 1])


def save_volume(path: Path, *slices: NDArray[np.generic]) -> Path:
    path.parent.mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.stack([values.T for values in slices], axis=2), AFFINE), path)
    return path


def labelled(path: Path) -> list[bool]:
    """Which slices of a NIfTI label map hold anything."""
    return [bool(x) for x in np.asarray(nibabel.load(path).dataobj).any(axis=(0, 1))]


def test_a_volume_does_not_take_the_name_of_another_image(tmp_path: Path) -> None:
    folder, out, values = tmp_path / "images", tmp_path / "out", chest(lungs(48))
    save_volume(folder / "a.nii.gz", values, values)
    write_dicom(folder / "a.dcm", values)
    save_volume(folder / "b.nii", values)
    save_volume(folder / "b.nii.gz", values, values, values)
    result = run("segment", folder, "--out", out, "--slice", "all", *QUICK_OPTIONS)
    assert result.exit_code == 0, result.output
    shapes = {path.name: nibabel.load(path).shape[2] for path in out.glob("*.labels.nii.gz")}
    assert sorted(shapes.values()) == [1, 1, 2, 3]
    assert shapes["a.labels.nii.gz"] == 1, "that of a.dcm, which comes first"
    again = run("segment", folder / "a.nii.gz", "--out", out, "--slice", "all", *QUICK_OPTIONS)
    assert again.exit_code == 0, again.output
    assert nibabel.load(out / "a.labels.nii.gz").shape[2] == 1, "nor in a later run"


def test_a_volume_replaces_the_record_of_its_slice(tmp_path: Path) -> None:
    """Both write name.labels.nii.gz; what was overwritten does not count as done."""
    values = chest(lungs(48))
    volume, out = save_volume(tmp_path / "v.nii.gz", values, values, values), tmp_path / "out"
    one, whole = (("segment", volume, "--out", out, *QUICK_OPTIONS, *more) for more in ((), ("--slice", "all")))
    for command, expected in ((one, [False, True, False]), (whole, [True] * 3), (one, [False, True, False])):
        result = run(*command)
        assert result.exit_code == 0, result.output
        assert labelled(out / "v.labels.nii.gz") == expected


def test_a_slice_of_volumes_beside_images_of_one_slice(tmp_path: Path) -> None:
    folder, out, values = tmp_path / "images", tmp_path / "out", chest(lungs(48))
    save_volume(folder / "v.nii.gz", values, values, values)
    save_volume(folder / "one.nii.gz", values)
    write_dicom(folder / "a.dcm", values)
    save(folder / "p.png", lesion(disc()))
    result = run("segment", folder, "--out", out, "--slice", "2", *QUICK_OPTIONS)
    assert result.exit_code == 0, result.output
    assert labelled(out / "v.labels.nii.gz") == [False, False, True]
    assert labelled(out / "one.labels.nii.gz") == labelled(out / "a.labels.nii.gz") == [True]


def test_every_slice_that_fails_is_named(tmp_path: Path) -> None:
    values = chest(lungs(48))
    volume = save_volume(tmp_path / "v.nii", values, values, values)
    volume.write_bytes(volume.read_bytes()[: 352 + values.nbytes + 7])
    result = run("segment", volume, "--out", tmp_path / "out", "--slice", "all", *QUICK_OPTIONS)
    assert result.exit_code == 1
    failed = [entry["source"] for entry in json.loads((tmp_path / "out" / "summary.json").read_text())["images"][1:]]
    assert failed == [f"{volume}, slice 1", f"{volume}, slice 2"]


def test_air_without_a_body_holds_no_lung(tmp_path: Path) -> None:
    values = chest(lungs(64))
    air = np.full_like(values, -1000)
    volume = save_volume(tmp_path / "v.nii.gz", air, values, air)
    options = ("--slice", "all", "--mask", "--modality", "CT", *QUICK_OPTIONS)
    assert run("segment", volume, "--out", tmp_path / "out", *options).exit_code == 0
    assert labelled(tmp_path / "out" / "v.mask.nii.gz") == [False, True, False]


def test_ct_in_a_tiff_is_seen_as_evaluated(tmp_path: Path) -> None:
    """In the window of CT, whatever the values that the scanner pads with."""
    values = chest(lungs(96))
    values[:4] = -3000
    tifffile.imwrite(tmp_path / "ct.tif", values)
    options = ("--mask", "--size", "64", "--embed-dim", "12", "--max-steps", "12", "--depth", "1")
    result = run("segment", tmp_path / "ct.tif", "--out", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    with PILImage.open(tmp_path / "out" / "ct.mask.png") as mask:
        found = np.asarray(mask) > 0
    assert json.loads((tmp_path / "out" / "ct.json").read_text())["rule"] == "lung"
    assert 2 * (found & lungs(96)).sum() / (found.sum() + lungs(96).sum()) > 0.8


def test_links_keep_their_names_and_folders(tmp_path: Path) -> None:
    """As data sets have them that are kept by a versioning system."""
    stored = save(tmp_path / "store" / "SHA256-abc.png", lesion(disc()))
    for place in ("sub-01/lesion.png", "sub-02/lesion.png"):
        (tmp_path / "in" / place).parent.mkdir(parents=True)
        (tmp_path / "in" / place).symlink_to(stored)
    out = tmp_path / "out"
    for _ in range(2):
        result = run("segment", tmp_path / "in", "--out", out, *QUICK_OPTIONS)
        assert result.exit_code == 0, result.output
    assert {"sub-01/lesion.json", "sub-02/lesion.json"} <= files(out)
    assert "2 of 2 images were already done" in result.output


def test_names_that_drawing_or_unicode_could_stumble_over(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    save(folder / "cost $5 a_$_ b.png", lesion(disc()))
    os.rename(save(folder / "M.png", lesion(disc())), os.fsencode(folder) + b"/M\xfcller.png")
    (folder / "x").write_bytes(b"")
    os.rename(folder / "x", os.fsencode(folder) + b"/bad\xfc.png")
    long = save(folder / f"{'x' * 233}.png", lesion(disc()))
    for done in ("[1/4]", "3 of 4 images were already done"):
        result = run("segment", folder, "--out", out, *QUICK_OPTIONS)
        assert result.exit_code == 1, result.output
        assert done in result.output
        assert "bad" in result.output.splitlines()[-2]
    assert "contact-sheet.png" in files(out)
    assert {"M\ufffdller.json", f"{long.stem}.json", "cost $5 a_$_ b.json"} <= files(out)


def test_a_file_of_the_user_is_not_overwritten(tmp_path: Path) -> None:
    """A list in a file that is called like the record of an image."""
    image = save(tmp_path / "a.png", lesion(disc()))
    (tmp_path / "a.json").write_text("[1, 2]")
    result = run("segment", image, "--out", tmp_path, *QUICK_OPTIONS)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "a.json").read_text() == "[1, 2]"
    assert (tmp_path / "a-png.labels.png").exists()


def test_names_of_jobs_below_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "in" / "sub" / "a.png", lesion(disc()))
    monkeypatch.chdir(tmp_path)
    source = Path("in/../in/sub/a.png")
    assert [job.name for job in plan_jobs([source], [Path("in")], tmp_path / "out")] == ["sub/a"]
    assert [job.name for job in plan_jobs([source], [source], tmp_path / "out")] == ["a"]


def test_a_tall_image_does_not_make_a_huge_sheet(tmp_path: Path) -> None:
    row = SheetRow("tall", "", np.zeros((700, 1, 3), np.uint8), np.zeros((700, 1), np.uint8))
    contact_sheet([row], tmp_path / "sheet.png")
    with PILImage.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width * sheet.height < 3e6


def test_a_name_that_cannot_be_written_fails_alone_and_before_its_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too long with what is added to it, in a folder that is a file there, or refused by the disk."""
    folder, out = tmp_path / "in", tmp_path / "out"
    for name in ("a", "y" * 245, "x" * 251, "sub/c", "refused", "z[/b]\x1b[31m"):
        save(folder / f"{name}.png", lesion(disc()))
    out.mkdir()
    (out / "sub").touch()
    original = os.replace

    def replaced(source: Path, target: Path) -> None:
        if Path(target).name.startswith("refused"):
            raise OSError(84, "Invalid or incomplete multibyte or wide character")
        original(source, target)

    monkeypatch.setattr(os, "replace", replaced)
    result = run("segment", folder, "--out", out, *QUICK_OPTIONS)
    assert result.exit_code == 1
    assert "2 of 6 images in" in result.output
    assert r"z[/b]\x1b[31m: " in result.output
    assert "\x1b" not in result.output
    lines = json.loads((out / "summary.json").read_text())["images"]
    failed = {Path(line["source"]).stem: line["error"] for line in lines if line["status"] == "failed"}
    reasons = {"y" * 245: "File name too long", "x" * 251: "File name too long", "c": "Not a directory"}
    assert {name: error.rpartition(": ")[2] for name, error in failed.items() if name != "refused"} == reasons
    assert "multibyte" in failed["refused"]
    assert {line["name"] for line in lines if line["status"] == "done"} == {"a", "z[/b]\x1b[31m"}


def test_names_that_some_disks_take_for_the_same(tmp_path: Path) -> None:
    names = ("Lesion.png", "lesion.png", "lesion.bmp", "\u00e4.png", "a\u0308.png", "SUMMARY.png")
    sources = [save(tmp_path / "in" / name, lesion(disc())) for name in names]
    found = [job.name for job in plan_jobs(sources, [tmp_path / "in"], tmp_path / "out")]
    assert len({unicodedata.normalize("NFC", name.casefold()) for name in found}) == len(names)
    assert found[:3] == ["Lesion", "lesion-png", "lesion-bmp"]
    assert found[-1] == "SUMMARY-png"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "lesion.json").write_text(json.dumps({"source": str(sources[1])}))
    later = {job.source.name: job.name for job in plan_jobs(sources[:2], [tmp_path / "in"], tmp_path / "out")}
    assert later == {"Lesion.png": "Lesion-png", "lesion.png": "lesion"}, "who has results keeps the name"


def test_an_image_that_is_gone_when_sheets_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        save(tmp_path / "in" / f"{name}.png", lesion(disc()))
    ended = RunProgress.ended

    def gone(self: RunProgress, name: str, outcome: str, items: int = 1) -> None:
        if name == "a":
            (tmp_path / "in" / "a.png").unlink()
        ended(self, name, outcome, items)

    monkeypatch.setattr(RunProgress, "ended", gone)
    result = run("segment", tmp_path / "in", "--out", tmp_path / "out", *QUICK_OPTIONS)
    assert result.exit_code == 0, result.output
    assert "not in the pictures of all" in result.output
    assert {"contact-sheet.png", "summary.json"} <= files(tmp_path / "out")


def test_a_label_map_larger_than_pillow_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 100)
    labels = np.arange(40 * 50, dtype=np.uint8).reshape(40, 50) % 7
    write_png(indexed_png(labels), tmp_path / "a.png", optimize=True)
    assert (read_labels(tmp_path / "a.png") == labels).all()
    row = small_row("a", "", np.zeros((3000, 1500, 3), np.uint8), np.zeros((3000, 1500), np.uint8), None)
    assert row.image.shape[:2] == row.labels.shape == (1000, 500)
