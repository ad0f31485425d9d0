"""DICOM and NIfTI, under the name that other code imports them by; they are in `msformer.io`."""

from msformer.io.base import AIR, CT_WINDOW, Geometry, ImageError, Slice, Window, apply_window, default_window, show
from msformer.io.dicom import is_dicom, read_dicom
from msformer.io.medical import SUFFIXES_MEDICAL, count_slices, is_medical, read_slice, slices_with_labels
from msformer.io.nifti import is_volume, read_nifti, write_nifti

__all__ = [
    "AIR",
    "CT_WINDOW",
    "SUFFIXES_MEDICAL",
    "Geometry",
    "ImageError",
    "Slice",
    "Window",
    "apply_window",
    "count_slices",
    "default_window",
    "is_dicom",
    "is_medical",
    "is_volume",
    "read_dicom",
    "read_nifti",
    "read_slice",
    "show",
    "slices_with_labels",
    "write_nifti",
]
