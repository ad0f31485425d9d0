"""Our readers beside pydicom, nibabel and, where it is installed, SimpleITK, on a few of the files that these ship."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from studies.readers import dicom, nifti
from studies.readers.__main__ import main, row
from studies.readers.compare import Outcome, Source, compare

FEW = (
    *("CT_small.dcm", "MR_small_bigendian.dcm", "MR_small_RLE.dcm", "image_dfl.dcm", "JPEGLSNearLossless_16.dcm"),
    *("SC_ybr_full_422_uncompressed.dcm", "SC_rgb_small_odd_big_endian.dcm", "rtdose_1frame.dcm", "chrX1.dcm"),
    *("examples_overlay.dcm", "decimal_rescale.dcm", "reportsi.dcm", "MR_truncated.dcm", "6154"),
)


@pytest.mark.filterwarnings("ignore")
def test_dicom_files_of_pydicom_and_nibabel() -> None:
    found = [path for path in dicom.files() if path.name in FEW]
    assert len(found) >= len(FEW) - 1
    for path in found:
        outcome = compare(dicom.SOURCE, path)
        assert not outcome.differing, path
        assert not set(outcome.silent) - {"SimpleITK", "pydicom's window"}, path
        assert outcome.empty == (path.name == "reportsi.dcm")
        assert bool(outcome.refused) == (path.name in ("reportsi.dcm", "MR_truncated.dcm"))


@pytest.mark.filterwarnings("ignore")
def test_volumes_of_nibabel() -> None:
    found = [path for path in nifti.files() if path.name in ("anatomical.nii", "example4d.nii.gz", "nifti1.hdr")]
    outcomes = [compare(nifti.SOURCE, path) for path in found]
    assert [outcome.refused[:10] for outcome in outcomes] == ["", "", "its voxels"]
    assert all("nibabel" in outcome.equal and not outcome.differing for outcome in outcomes[:2])


def test_differences_are_found(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    pixels = np.arange(6).reshape(2, 3)

    def broken(path: Path, index: int) -> None:
        raise RuntimeError("cannot")

    readers = {
        "same": ("values", lambda path, index: pixels),
        "near": ("values", lambda path, index: pixels + 1),
        "other": ("values", lambda path, index: pixels + 2 * (pixels == 4)),
        "turned": ("values", lambda path, index: pixels.T),
        "known": ("values", lambda path, index: pixels * 9),
        "broken": ("values", broken),
    }
    source = Source(
        "a test",
        lambda: iter([tmp_path / "a"]),
        lambda path: 2,
        {"values": lambda path, index: (pixels, pixels < 5)},
        readers,  # type: ignore[arg-type]
        {"values": 1},
        known={("known", "^a$"): "it is so"},
    )
    outcome = compare(source, tmp_path / "a")
    assert outcome.equal == ("same", "near")
    assert outcome.differing["other"] == "picture 0: up to 2 apart in 20% of the pixels"
    assert outcome.differing["turned"] == "picture 0: the shape is (2, 3), theirs (3, 2)"
    assert outcome.explained == {"known": "it is so"}
    assert outcome.silent == {"broken": "RuntimeError: cannot"}
    line = row(source, [outcome, Outcome(tmp_path, refused="no", empty=True), Outcome(tmp_path, refused="no")])
    assert line.startswith("| a test | 3 | 1 | 1 (2) | same 1 of 1; near 1 of 1; other 0 of 1;")
    assert line.endswith("| 1 |")


def test_table() -> None:
    result = CliRunner().invoke(main, ["--only", "nifti"])
    assert result.exit_code == 0, result.output
    assert "| NIfTI of nibabel | 11 | 0 | 7 (189) | nibabel 7 of 7;" in result.output
