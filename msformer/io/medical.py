"""Medical files of either kind: one picture each, with the values in the modality's own units."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from msformer.io.base import ImageError, Slice
from msformer.io.dicom import is_dicom, read_dicom
from msformer.io.nifti import is_volume, read_nifti

SUFFIXES_MEDICAL = (".dcm", ".dicom", ".nii", ".nii.gz")


def is_medical(path: str | PathLike[str]) -> bool:
    """Whether the path has a suffix of DICOM or NIfTI, or is a DICOM file by its content."""
    return Path(path).name.lower().endswith(SUFFIXES_MEDICAL) or is_dicom(path)


def read_slice(path: str | PathLike[str], index: int | None = None) -> Slice:
    """`read_nifti` or `read_dicom`, by the name of the file; raises ImageError for an index of a DICOM file but 0."""
    if is_volume(path):
        return read_nifti(path, index)
    if index not in (None, 0):
        raise ImageError(f"{path}: a DICOM file has one slice, got index {index}")
    return read_dicom(path)
