"""Medical files of either kind: one picture each, with the values in the modality's own units."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np

from msformer.io import nifti
from msformer.io.base import Slice
from msformer.io.containers import is_picture
from msformer.io.dicom import count_frames, is_dicom, read_dicom
from msformer.io.dicom_file import SUFFIXES_DICOM
from msformer.io.nifti import read_nifti
from msformer.io.nifti_file import SUFFIXES_NIFTI, is_volume

SUFFIXES_MEDICAL = (*SUFFIXES_DICOM, *SUFFIXES_NIFTI)


def is_medical(path: str | PathLike[str]) -> bool:
    """Whether the path has a suffix of DICOM or NIfTI, or is such a file by its content, which counts."""
    if is_dicom(path):
        return True
    return (Path(path).name.lower().endswith(SUFFIXES_MEDICAL) or is_volume(path)) and not is_picture(path)


def read_slice(path: str | PathLike[str], index: int | None = None, modality: str | None = None) -> Slice:
    """`read_nifti` or `read_dicom`, by the content of the file, or where that says nothing by its name.

    Args:
        modality: what it is of, whatever the file says; None: as the file says.
    """
    read = read_nifti if is_volume(path) and not is_dicom(path) else read_dicom
    return read(path, index, modality)


def count_slices(path: str | PathLike[str]) -> int:
    """How many pictures `read_slice` can read from the file; 1 for one that is not medical.

    Raises:
        FileNotFoundError, PermissionError, ImageError: as for `read_slice`.
    """
    if is_volume(path) and not is_dicom(path):
        return nifti.count_slices(path)
    return count_frames(path) if is_medical(path) else 1


def slices_with_labels(path: str | PathLike[str], labels: Sequence[int] = ()) -> list[int]:
    """The indexes of a file's pictures, as `read_slice` counts them, that hold one of the labels; where none is given,
    anything but 0.

    Raises:
        FileNotFoundError, PermissionError, ImageError: as for `read_slice`.
    """
    if is_volume(path) and not is_dicom(path):
        return nifti.slices_with_labels(path, labels)
    frames = (read_dicom(path, index).pixels for index in range(count_frames(path)))
    return [index for index, pixels in enumerate(frames) if (np.isin(pixels, labels) if labels else pixels).any()]
