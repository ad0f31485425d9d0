"""A small world that test files show: as NIfTI in any orientation, as DICOM, and label maps on its slices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")

UID = pydicom.uid
NAME = "name with space ü"
ORIENTATIONS = ["RAS", "LPS", "LAS", "SAR", "PIR", "ILA"]

# one world for all files: voxels to the right, the front, the head
WORLD = np.arange(6 * 5 * 4, dtype=np.int16).reshape(6, 5, 4) * 7 % 113
ANGLE = np.deg2rad(20)
TURN = np.array([[np.cos(ANGLE), -np.sin(ANGLE), 0], [np.sin(ANGLE), np.cos(ANGLE), 0], [0, 0, 1]])
AFFINE = np.eye(4)
AFFINE[:3, :3] = TURN @ np.diag([0.5, 0.75, 3])
AFFINE[:3, 3] = 10, -20, 30

# a shape without symmetry, on rows and columns of the picture of 5 rows and 6 columns
LABELS = np.zeros((5, 6), dtype=np.int64)
LABELS[0, 1:4] = 1
LABELS[1:3, 1] = 2
LABELS[4, 5] = 3


def shown(index: int) -> NDArray[Any]:
    """The world's slice as a radiologist sees it, computed another way than in the package."""
    return np.array([[WORLD[x, y, index] for x in reversed(range(6))] for y in reversed(range(5))])


def world_positions(index: int, label: int) -> NDArray[np.float64]:
    """The positions of the pixels of LABELS that have a label, sorted, when it lies on the world's slice."""
    rows, columns = np.nonzero(np.equal(LABELS, label))
    return sorted_positions(AFFINE, np.stack([5 - columns, 4 - rows, np.full(len(rows), index)], axis=1))


def sorted_positions(affine: NDArray[np.float64], voxels: NDArray[Any]) -> NDArray[np.float64]:
    positions = (voxels @ affine[:3, :3].T + affine[:3, 3]).round(3) + 0.0
    return positions[np.lexsort(positions.T)]


def written_positions(path: Path, label: int) -> NDArray[np.float64]:
    image = nibabel.load(path)
    return sorted_positions(image.affine, np.argwhere(np.asarray(image.dataobj).reshape(image.shape[:3]) == label))


def save_nifti(path: Path, codes: str = "RAS", data: NDArray[Any] = WORLD, affine: NDArray[Any] = AFFINE) -> None:
    """Saves the data, whose axes go to the right, the front and the head, with its axes stored in another order."""
    orientations = nibabel.orientations
    image = nibabel.Nifti1Image(data, affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    turn = orientations.ornt_transform(orientations.io_orientation(affine), orientations.axcodes2ornt(codes))
    image = image.as_reoriented(turn)
    nibabel.save(image, path)


def save_dicom(
    path: Path, pixels: NDArray[Any], photometric: str = "MONOCHROME2", syntax: str | None = None, **tags: Any
) -> Path:
    """Saves native pixels, or encapsulates `PixelData` of the tags for a compressed transfer syntax."""
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID.CTImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    meta.TransferSyntaxUID = syntax or UID.ExplicitVRLittleEndian
    dataset = pydicom.dataset.FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = UID.CTImageStorage, "1.2.3"
    dataset.Rows, dataset.Columns = pixels.shape[-2:] if pixels.ndim == 2 else pixels.shape[-3:-1]
    dataset.SamplesPerPixel = 1 if pixels.ndim == 2 else pixels.shape[-1]
    dataset.PhotometricInterpretation = photometric
    dataset.BitsAllocated = dataset.BitsStored = pixels.dtype.itemsize * 8
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    if dataset.SamplesPerPixel == 3:
        dataset.PlanarConfiguration = 0
    dataset.PixelData = pixels.tobytes()
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    dataset["PixelData"].VR = "OB" if dataset.BitsAllocated == 8 else "OW"
    dataset.save_as(path, enforce_file_format=True)
    return path


def save_world_dicom(path: Path, index: int) -> Path:
    """An axial picture of the world, as DICOM says where it lies."""
    lps = np.diag([-1.0, -1, 1])
    return save_dicom(
        path,
        shown(index),
        Modality="CT",
        ImagePositionPatient=(lps @ (AFFINE @ [5, 4, index, 1])[:3]).tolist(),
        ImageOrientationPatient=np.concatenate([lps @ -TURN[:, 0], lps @ -TURN[:, 1]]).round(12).tolist(),
        PixelSpacing=[0.75, 0.5],
        SliceThickness=3,
    )


GREY = np.arange(20, dtype=np.int16).reshape(4, 5)
COLOUR = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
