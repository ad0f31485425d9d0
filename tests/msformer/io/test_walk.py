"""Folders as people have them: a walk ends, and gives images only."""

from __future__ import annotations

import inspect
import os
import socket
import sys
from pathlib import Path

import pytest

from msformer.io.files import find_images
from tests.msformer.conftest import QUICK_OPTIONS
from tests.msformer.evaluation import data
from tests.msformer.test_cli import run


def names(*folders: Path) -> list[str]:
    return [path.name for path in find_images(folders)]


def touched(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.mark.filterwarnings("error")
def test_links_in_circles(tmp_path: Path) -> None:
    touched(tmp_path / "a" / "1.png")
    touched(tmp_path / "b" / "2.png")
    for folder in ("a", "b"):
        for number in range(3):  # three ways on from every folder: 3^n paths of length n
            (tmp_path / folder / f"up{number}").symlink_to("..")
        (tmp_path / folder / "other").symlink_to(tmp_path / ("b" if folder == "a" else "a"))
    assert names(tmp_path) == ["1.png", "2.png"]
    assert names(tmp_path, tmp_path / "a", tmp_path / "b" / "other", tmp_path) == ["1.png", "2.png"]
    (tmp_path / "a" / "self.png").symlink_to("self.png")
    assert names(tmp_path) == ["1.png", "2.png", "self.png"], "reading it says what is wrong"


def test_folders_nested_deeper_than_python_recurses(tmp_path: Path) -> None:
    touched(tmp_path.joinpath(*["d"] * 200, "a.png"))
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 100)
    try:
        assert names(tmp_path) == ["a.png"]
    finally:
        sys.setrecursionlimit(limit)


def test_what_is_no_regular_file_is_left_out_and_named(tmp_path: Path) -> None:
    touched(tmp_path / "a.png")
    os.mkfifo(tmp_path / "queue")
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "s\x1b.png"))
        with pytest.warns(UserWarning, match="left out: ") as warned:
            assert names(tmp_path) == ["a.png"]
    (message,) = {str(each.message) for each in warned}
    assert "b.png, queue (named pipe)" in message
    assert "c.png (character device)" in message
    assert "(socket)" in message
    with pytest.raises(ValueError, match=r"b\.png: expected a file or folder, got a named pipe"):
        find_images([tmp_path / "b.png"])


def test_a_subfolder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touched(tmp_path / "a.png")
    touched(tmp_path / "closed" / "b.png")
    original = Path.iterdir

    def refuse(self: Path) -> object:
        if self.name == "closed":
            raise PermissionError(13, "Permission denied")
        return original(self)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.warns(UserWarning, match=r"left out: closed \(cannot be read, Permission denied\)"):
        assert names(tmp_path) == ["a.png"]


def test_results_are_no_images(tmp_path: Path) -> None:
    """Of segment and evaluate, complete or interrupted, beside images or below them."""
    folder = tmp_path / "d"
    data.make_pairs(folder, ("a",))
    images = sorted(folder.rglob("*.png"))
    result = run("segment", folder / "images" / "a.png", "--mask", "--out", folder / "images", *QUICK_OPTIONS)
    assert result.exit_code == 0, result.output
    result = run("evaluate", "--data", folder, "--methods", "otsu", "--size", "33", "--out", folder / "r2")
    assert result.exit_code == 0, result.output
    with pytest.warns(UserWarning, match="results of an earlier run in"):
        assert sorted(find_images([folder])) == images
    for record in [*folder.rglob("*.json")]:
        record.unlink()  # as if each was interrupted before
    with pytest.warns(UserWarning, match="results of an earlier run in"):
        assert sorted(find_images([folder])) == images


def test_images_that_are_called_like_results(tmp_path: Path) -> None:
    """What nothing says to be of an earlier run is an image, whatever its name."""
    for name in ("a.mask.png", "contact-sheet.png", "maps/x/b.png", "c.labels.nii.gz"):
        touched(tmp_path / name)
    (tmp_path / "a.json").write_text('{"settings": 1}')
    assert sorted(names(tmp_path)) == ["a.mask.png", "b.png", "c.labels.nii.gz", "contact-sheet.png"]
