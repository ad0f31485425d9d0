"""NIfTI: slices beside those of nibabel and SimpleITK, all brought to the same orientation by them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msformer.io.base import ImageError
from msformer.io.nifti import count_slices, read_nifti
from studies.readers.compare import Source, optional, shipped


def files() -> Iterator[Path]:
    """What nibabel ships."""
    yield from shipped("nibabel", "tests/data", r"\.(nii|nii\.gz|hdr|img)$")


def pictures(path: Path) -> int:
    """Slices of axial volumes, which are what the readers are compared in."""
    count = count_slices(path)
    if count == 1:
        raise ImageError(f"{path}: has one slice, which is compared in tests alone")
    return count


def ours(path: Path, index: int) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    found = read_nifti(path, index)
    return found.pixels, None if found.background is None else ~found.background


@lru_cache(maxsize=1)
def _with_nibabel(path: Path) -> Any:
    import nibabel

    canonical = nibabel.as_closest_canonical(nibabel.load(path))  # to the right, the front, the head
    return np.asarray(canonical.dataobj)


def nibabel_slice(path: Path, index: int) -> NDArray[Any]:
    volume, at = divmod(index, _with_nibabel(path).shape[2])
    data = _with_nibabel(path)
    further = np.unravel_index(volume, data.shape[3:], order="F")
    turned = np.moveaxis(data[::-1, ::-1, at], (0, 1), (-1, -2))  # further axes, rows, columns
    return np.asarray(turned[tuple(further)], np.float32)


@lru_cache(maxsize=1)
def _with_simpleitk(path: Path) -> Any:
    sitk = optional("SimpleITK")
    if sitk is None:
        raise NotImplementedError("SimpleITK is not installed")
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    image = sitk.ReadImage(str(path))
    count = image.GetSize()[3] if image.GetDimension() > 3 else 0
    volumes = [image[:, :, :, i] for i in range(count)] or [image]
    return [sitk.GetArrayFromImage(sitk.DICOMOrient(volume, "LPS")) for volume in volumes]


def simpleitk_slice(path: Path, index: int) -> NDArray[Any]:
    volumes = _with_simpleitk(path)
    volume, at = divmod(index, len(volumes[0]))
    return np.asarray(volumes[volume][at], np.float32)


SOURCE = Source(
    "NIfTI of nibabel",
    files,
    pictures,
    {"values": ours},
    {"nibabel": ("values", nibabel_slice), "SimpleITK": ("values", simpleitk_slice)},
)
