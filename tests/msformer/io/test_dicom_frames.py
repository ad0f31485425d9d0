"""DICOM files with several pictures: cine, and enhanced CT and MR with functional groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest

from msformer.io.base import ImageError, show
from msformer.io.dicom import count_frames, read_dicom
from msformer.io.medical import count_slices, read_slice, slices_with_labels
from msformer.io.nifti import write_nifti
from msformer.runs.plan import plan_jobs
from tests.msformer.io.world import COLOUR, GREY, UID, save_dicom

FRAMES = np.stack([GREY, GREY + 100, GREY + 300])


def save_frames(path: Path, frames: Any = FRAMES, photometric: str = "MONOCHROME2", **tags: Any) -> Path:
    return save_dicom(
        path, frames[0], photometric, **{"NumberOfFrames": len(frames), "PixelData": frames.tobytes()} | tags
    )


def groups(*contents: dict[str, dict[str, Any]]) -> list[pydicom.Dataset]:
    """Functional groups, each of macros with elements."""
    found = []
    for macros in contents:
        group = pydicom.Dataset()
        for name, elements in macros.items():
            macro = pydicom.Dataset()
            for keyword, value in elements.items():
                setattr(macro, keyword, value)
            setattr(group, name, [macro])
        found.append(group)
    return found


def test_each_frame(tmp_path: Path) -> None:
    path = save_frames(tmp_path / "a.dcm")
    assert count_frames(path) == count_slices(path) == 3
    for index, frame in enumerate(FRAMES):
        found = read_slice(path, index)
        assert np.array_equal(found.pixels, frame)
        assert (found.index, found.count) == (index, 3)
    assert np.array_equal(read_slice(path).pixels, FRAMES[1]), "the middle one"
    assert [job.name for job in plan_jobs([path], [], tmp_path, all_slices=True)] == [
        f"a-slice-{index:03d}" for index in range(3)
    ]
    for index in (-1, 3):
        with pytest.raises(ImageError, match=rf"a\.dcm: expected a frame from 0 to 2, got {index}"):
            read_slice(path, index)


def test_frames_of_colours_and_compressed_ones(tmp_path: Path) -> None:
    frames = np.stack([COLOUR, COLOUR // 2])
    path = save_frames(tmp_path / "a.dcm", frames, "RGB")
    dataset = pydicom.dcmread(path)
    dataset.compress(UID.RLELossless)
    dataset.save_as(tmp_path / "b.dcm")
    for name in ("a.dcm", "b.dcm"):
        assert all(np.array_equal(read_dicom(tmp_path / name, i).pixels, frames[i]) for i in (0, 1))


def test_a_file_that_was_changed_is_read_again(tmp_path: Path) -> None:
    path = save_frames(tmp_path / "a.dcm")
    read_slice(path, 0)
    save_frames(path, FRAMES[:2] + 7, Modality="MR")
    assert np.array_equal(read_slice(path, 0).pixels, GREY + 7)
    assert count_slices(path) == 2


def test_functional_groups(tmp_path: Path) -> None:
    """What is said of each frame goes before what is said of all, and both before what is said outside."""
    shared = groups(
        {
            "PixelMeasuresSequence": {"PixelSpacing": [2, 3], "SliceThickness": 9},
            "PlaneOrientationSequence": {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]},
            "PixelValueTransformationSequence": {"RescaleSlope": 7, "RescaleIntercept": 1},
            "FrameVOILUTSequence": {"WindowCenter": 100, "WindowWidth": 11, "VOILUTFunction": "LINEAR_EXACT"},
        }
    )
    frames = groups(
        *(
            {
                "PlanePositionSequence": {"ImagePositionPatient": [10, 20, 30 - 4 * i]},
                "PixelValueTransformationSequence": {"RescaleSlope": i + 1, "RescaleIntercept": -10 * i},
                **({"FrameVOILUTSequence": {"WindowCenter": 50, "WindowWidth": 8}} if i == 2 else {}),
            }
            for i in range(3)
        )
    )
    path = save_frames(
        tmp_path / "a.dcm",
        SharedFunctionalGroupsSequence=shared,
        PerFrameFunctionalGroupsSequence=frames,
        RescaleSlope=1000,
    )
    for i in range(3):
        found = read_slice(path, i)
        assert np.array_equal(found.pixels, FRAMES[i] * (i + 1.0) - 10 * i)
        # a macro of a frame is in place of the shared one: without a function of its own, it is LINEAR
        assert found.window == ((46, 53) if i == 2 else (94.5, 105.5))
        assert found.geometry is not None
        assert found.geometry.shape == (5, 4, 3)
        x, y, z = (found.geometry.affine @ [1, 2, i, 1])[:3]
        assert (x, y, z) == (-(10 + 3), -(20 + 2 * 2), 30 - 4 * i)


def test_labels_of_frames_are_written_to_one_volume(tmp_path: Path) -> None:
    frames = groups(*({"PlanePositionSequence": {"ImagePositionPatient": [0, 0, 2.5 * i]}} for i in range(3)))
    path = save_frames(tmp_path / "a.dcm", PerFrameFunctionalGroupsSequence=frames)
    parts = [((FRAMES[i] % 2).astype(np.uint8), read_slice(path, i)) for i in (0, 2)]
    write_nifti(tmp_path / "a.nii.gz", parts)
    written = nibabel.load(tmp_path / "a.nii.gz")
    volume = np.asarray(written.dataobj)
    assert volume.shape == (5, 4, 3)
    assert np.array_equal(volume[:, :, 2].T, FRAMES[2] % 2)
    assert not volume[:, :, 1].any()
    assert np.array_equal(written.affine[:3, 2], [0, 0, 2.5])


def test_frames_that_do_not_lie_in_a_row(tmp_path: Path) -> None:
    for name, places in {"uneven": (0, 1, 5), "same": (3, 3, 3)}.items():
        frames = groups(*({"PlanePositionSequence": {"ImagePositionPatient": [0, 0, z]}} for z in places))
        path = save_frames(tmp_path / f"{name}.dcm", PerFrameFunctionalGroupsSequence=frames, SliceThickness=4)
        found = read_slice(path, 2)
        assert found.geometry is not None
        assert found.geometry.affine[2, 2] == 4
        assert "the frames do not lie at equal distances; their volume is as if they did" in found.notes


def test_doses_on_a_grid(tmp_path: Path) -> None:
    path = save_frames(tmp_path / "a.dcm", GridFrameOffsetVector=[0, 3, 6], Modality="RTDOSE", DoseGridScaling=2)
    found = read_slice(path, 2)
    assert found.geometry is not None
    assert found.geometry.affine[2, 2] == 3
    assert np.array_equal(found.pixels, FRAMES[2] * 2)


def test_frames_with_labels(tmp_path: Path) -> None:
    frames = np.stack([GREY * 0, GREY, GREY * 0, GREY])
    assert slices_with_labels(save_frames(tmp_path / "a.dcm", frames)) == [1, 3]


def test_a_damaged_group_of_one_frame(tmp_path: Path) -> None:
    """The others are read as they are; that one without what it lost."""
    frames = groups(*({"PixelValueTransformationSequence": {"RescaleSlope": 2, "RescaleIntercept": 0}},) * 2, {})
    path = save_frames(tmp_path / "a.dcm", PerFrameFunctionalGroupsSequence=frames)
    assert np.array_equal(read_slice(path, 1).pixels, FRAMES[1] * 2)
    assert np.array_equal(read_slice(path, 2).pixels, FRAMES[2])
    assert show(read_slice(path, 2)).max() == 255


@pytest.mark.parametrize("said", [None, 9, 1 << 30])
def test_numbers_of_frames_that_the_pixels_do_not_have(said: int | None, tmp_path: Path) -> None:
    path = save_frames(tmp_path / "a.dcm", NumberOfFrames=said)
    with pytest.warns(UserWarning, match="NumberOfFrames: got .*, but there are pixels for 3; 3 is assumed"):
        assert count_slices(path) == 3
    assert np.array_equal(read_slice(path, 2).pixels, FRAMES[2])
    dataset = pydicom.dcmread(save_frames(tmp_path / "b.dcm"))
    dataset.compress(UID.RLELossless)
    dataset.NumberOfFrames = said
    dataset.save_as(tmp_path / "b.dcm")
    assert count_slices(tmp_path / "b.dcm") == (1 if said is None else 3)
    assert np.array_equal(read_slice(tmp_path / "b.dcm", 0).pixels, FRAMES[0])


def test_fewer_frames_than_pixels(tmp_path: Path) -> None:
    """What follows them may be anything."""
    path = save_frames(tmp_path / "a.dcm", NumberOfFrames=2)
    assert count_slices(path) == 2
    assert np.array_equal(read_slice(path, 1).pixels, FRAMES[1])
