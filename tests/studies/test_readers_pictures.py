"""The comparison of readers of ordinary pictures, over files written here and a few that packages ship."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import skimage
import tifffile
from click.testing import CliRunner
from PIL import Image as PILImage

from studies.readers.pictures import DIFFERENT, EQUAL, REFUSED, compare, main

COLOUR = np.random.default_rng(0).integers(0, 256, (24, 32, 3)).astype(np.uint8)
SHIPPED = ("multipage.tif", "multipage_rgb.tif", "no_time_for_that_tiny.gif", "horse.png", "color.png", "phantom.png")
OPTIONS = {
    "PNG": [{}, {"transparency": 3}],
    "JPEG": [{"quality": 90}, {"quality": 90, "subsampling": 0}],
    "GIF": [{}],
    "BMP": [{}],
    "WEBP": [{"lossless": True}, {"quality": 80}],
    "JPEG2000": [{}],
    "TIFF": [{"compression": name} for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")],
}


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LA"])
def test_pictures_written_by_pillow(kind: str, mode: str, tmp_path: Path) -> None:
    if (kind, mode) == ("JPEG2000", "CMYK"):
        pytest.skip("the second reader does not convert it")
    for number, options in enumerate(OPTIONS[kind]):
        path = tmp_path / f"{number}"
        try:
            PILImage.fromarray(COLOUR).convert(mode).save(path, kind, **options)
        except (OSError, ValueError, RuntimeError, TypeError, KeyError):
            continue  # no such kind of file
        found = compare(path)
        assert found is not None
        assert found.outcome != DIFFERENT, found
        assert found.outcome != REFUSED, found


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32, np.uint32, np.float32, np.float64])
@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "zstd"])
def test_tiff_written_by_tifffile(dtype: type, compression: str | None, tmp_path: Path) -> None:
    pixels = COLOUR.astype(dtype)
    for name, stored, kind in (("a.tif", pixels, "rgb"), ("b.tif", pixels[..., 0], "minisblack")):
        tifffile.imwrite(tmp_path / name, stored, photometric=kind, compression=compression, predictor=False)
        found = compare(tmp_path / name)
        assert found is not None
        assert found.outcome == EQUAL, found


def test_what_packages_ship() -> None:
    folder = Path(skimage.__file__).parent / "data"
    found = [compare(folder / name) for name in SHIPPED if (folder / name).exists()]
    assert len(found) >= 3
    assert {one.outcome for one in found if one is not None} == {EQUAL}


def test_the_command(tmp_path: Path) -> None:
    PILImage.fromarray(COLOUR).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:900])
    (tmp_path / "c.png").write_text("no picture")
    done = CliRunner().invoke(main, [str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "| PNG | 1 | 0 | 1 | 0 | 0 | 0 |" in done.output
    assert "refused by both: PNG b.png: damaged" in done.output
