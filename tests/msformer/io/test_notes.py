"""What was assumed of ordinary pictures and masks, or left out, is said with what was read of them."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image as PILImage

from msformer.evaluation.layouts import Case
from msformer.evaluation.pairs import read_pair
from msformer.io.base import Notes
from msformer.io.ordinary import _warnings_of_pillow
from msformer.io.prepare import prepare_image
from msformer.io.read import Reading, read_picture
from tests.msformer.evaluation import data

COLOUR = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)


def notes(path: Path) -> list[str]:
    with pytest.warns(UserWarning, match=path.name) as warned:
        found = read_picture(path).facts["notes"]
    assert [str(each.message) for each in warned] == [f"{path}: {note}" for note in found]
    return list(found)


def test_pages_that_are_passed_over(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(COLOUR[::2, ::2], photometric="rgb")
        file.write(COLOUR, photometric="rgb")
    assert notes(tmp_path / "a.tif") == ["page 2 of 2, the largest, is read"]
    values = np.where(np.eye(16, dtype=bool), np.nan, 5).astype(np.float32)
    tifffile.imwrite(tmp_path / "gaps.tif", values)
    assert notes(tmp_path / "gaps.tif") == ["16 missing values are shown as the lowest"]


def test_animations_and_damaged_exif(tmp_path: Path) -> None:
    frames = [PILImage.fromarray(COLOUR), PILImage.fromarray(COLOUR[::-1].copy())]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert notes(tmp_path / "a.gif") == ["the first of 2 pictures is read"]
    frames[0].save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert notes(tmp_path / "a.jpg") == ["the EXIF is damaged; of the orientation is used what it still says"]
    frames[0].save(tmp_path / "b.jpg", exif=b"Exif\0\0XX")
    assert "the EXIF is damaged, and the picture taken as it is stored" in notes(tmp_path / "b.jpg")[0]


def test_warnings_of_other_threads_are_not_lost(tmp_path: Path) -> None:
    """Pillow is silenced for a moment, in which another image may have something to say."""
    with pytest.warns(UserWarning, match="of another") as warned, _warnings_of_pillow(Notes(tmp_path)):
        warnings.warn("of another", stacklevel=1)
    assert len(warned) == 1


def test_of_a_true_mask(tmp_path: Path) -> None:
    image = data.save(tmp_path / "a.png", data.lesion(data.disc()))
    pages = [data.disc().astype(np.uint8) * 255, np.zeros((40, 48), np.uint8)]
    tifffile.imwrite(tmp_path / "m.tif", np.stack(pages), photometric="minisblack")
    with pytest.warns(UserWarning, match=r"m\.tif: the first of 2 pages is read"):
        pair = read_pair(Case("a", image, tmp_path / "m.tif"))
    assert pair.read["masks"] == ["m.tif: the first of 2 pages is read"]
    assert pair.read["notes"] == []


def test_a_reading_of_what_is_no_file() -> None:
    values = np.arange(64, dtype=np.int16).reshape(8, 8)
    found = prepare_image(values, Reading(window=(10, 20)))
    assert found[0].flatten()[[10, 15, 20, 63]].tolist() == [0, pytest.approx(0.5, abs=0.01), 1, 1]
    for reading, name in ((Reading(slice_index=1), "slice_index"), (Reading(modality="CT"), "modality")):
        with pytest.raises(ValueError, match=f"{name}: expected the path of a file with it, got an image in memory"):
            prepare_image(values, reading)
