"""Where the frames of a DICOM file lie in the world."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from msformer.io.base import Geometry, Notes
from msformer.io.dicom_file import DicomFile
from msformer.io.dicom_pixels import Layout
from msformer.io.dicom_values import Values
from msformer.io.nifti import IDENTITY

_SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
_DEPTHS = ("SliceThickness", "SpacingBetweenSlices")


def frame_geometry(file: DicomFile, index: int, layout: Layout, notes: Notes) -> Geometry:
    """A frame in the volume ``[columns, rows, frames]`` of all. DICOM PS3.3, C.7.6.2.1.1, its LPS+ turned into RAS+.

    Where the frames do not lie one behind the other at equal distances, the volume is as if they did.
    """
    if file.affine is None:
        found = Notes(file.path)
        file.affine = _affine(file, found), found.sentences
    affine, sentences = file.affine
    notes.sentences += [sentence for sentence in sentences if sentence not in notes.sentences]
    place = (slice(0, layout.columns), slice(0, layout.rows), slice(index, index + 1))
    return Geometry(affine, (layout.columns, layout.rows, file.frames), place, IDENTITY)


def _affine(file: DicomFile, notes: Notes) -> NDArray[np.float64]:
    values = file.frame(0, notes)
    axes, corner = _axes(values), _position(values)
    spacings = [values.numbers(keyword, 2) for keyword in _SPACINGS]  # between rows, between columns
    spacing = next((found for found in spacings if found.size and (found > 0).all()), np.ones(2))
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = axes[0] * spacing[1], axes[1] * spacing[0]
    step = _step(file, axes, corner, notes) if file.frames > 1 else None
    affine[:3, 2] = np.cross(axes[0], axes[1]) * _depth(values) if step is None else step
    affine[:3, 3] = 0 if corner is None else corner
    affine[:2] *= -1
    return affine


def _axes(values: Values) -> NDArray[np.float64]:
    """Unit vectors along rows and columns ``[2, 3]``, by default those of an axial picture."""
    axes = values.numbers("ImageOrientationPatient", 6).reshape(-1, 3)
    return axes if axes.size and np.linalg.norm(np.cross(axes[0], axes[1])) >= 0.5 else np.eye(3)[:2]


def _position(values: Values) -> NDArray[np.float64] | None:
    found = values.numbers("ImagePositionPatient", 3)
    return found if found.size else None


def _depth(values: Values) -> float:
    depths = [values.number(keyword) for keyword in _DEPTHS]
    return next((depth for depth in depths if depth is not None and depth > 0), 1.0)


def _step(file: DicomFile, axes: NDArray[Any], corner: NDArray[Any] | None, notes: Notes) -> NDArray[np.float64] | None:
    """From one frame to the next; None where the file does not say, or they do not lie in a row."""
    offsets = file.frame(0, notes).numbers("GridFrameOffsetVector", file.frames)  # of doses, C.8.8.3.2
    if offsets.size:
        steps = np.diff(offsets)[:, None] * np.cross(axes[0], axes[1])
    elif corner is not None and "PerFrameFunctionalGroupsSequence" in file.dataset:
        frames = [file.frame(index, notes) for index in range(file.frames)]
        positions = [_position(values) for values in frames]
        if any(position is None for position in positions):
            return None
        if any(np.abs(_axes(values) - axes).max() > 1e-3 for values in frames):
            notes.assume("the frames are turned against one another; their volume is that of the first")
            return None
        steps = np.diff(np.array([position for position in positions if position is not None]), axis=0)
    else:
        return None
    even = np.abs(steps - steps[0]).max() <= 1e-2 * max(float(np.linalg.norm(steps[0])), 1e-6)
    if not even or not steps[0].any():
        notes.assume("the frames do not lie at equal distances; their volume is as if they did")
        return None
    return np.asarray(steps.mean(axis=0))
