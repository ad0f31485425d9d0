"""Images and true masks as arrays, pixel on pixel.

A NIfTI mask lies on its image by the positions that both files give, not by the order of their voxels; that of a DICOM
picture is turned like the picture. Positions that only differ by a shift or a scale are taken for the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from msformer.evaluation.layouts import Case
from msformer.io.base import Geometry, show
from msformer.io.medical import is_medical, read_slice
from msformer.io.nifti import is_volume
from msformer.io.ordinary import read_alpha
from msformer.io.prepare import prepare_image
from msformer.io.read import Reading, is_colour, is_ct, read_image
from msformer.scoring import Mask
from msformer.selection import AUTO, rule_for

_LABELS = "SEG"
"""The modality of masks, as DICOM abbreviates it."""


@dataclass(frozen=True)
class Pair:
    """An image and its mask as arrays."""

    image: Tensor
    """``[3, H, W]``, float32 in [0, 1]."""
    truth: Mask
    """``[H, W]``."""
    colour: bool
    """False where the three channels are the same."""


def read_pair(case: Case) -> Pair:
    """Raises ValueError or OSError where a file cannot be read, or the mask does not lie on the image."""
    if is_medical(case.image) and is_medical(case.mask):
        picture = read_slice(case.image, case.slice_index, case.modality)
        labels = read_slice(case.mask, case.slice_index, _LABELS)
        pixels: NDArray[Any] = show(picture, case.window)
        placed = is_volume(case.image) or is_volume(case.mask)
        truth = _anything(labels.pixels)
        if placed and labels.geometry is not None and picture.geometry is not None:
            truth = turned_like(truth, labels.geometry, picture.geometry, case.mask)
    else:
        pixels = read_image(case.image, _reading(case))
        truth = read_mask(case.mask, case.slice_index)
    image = prepare_image(pixels)
    if truth.shape != tuple(image.shape[1:]):
        sizes = " x ".join(map(str, truth.shape)), " x ".join(map(str, image.shape[1:]))
        raise ValueError(f"{case.mask}: the mask has {sizes[0]} pixels, the image {sizes[1]}")
    return Pair(image, truth, colour=is_colour(image))


def rule_of(case: Case, pair: Pair, rule: str) -> str:
    """The rule of the blind score, or instead of ``"auto"`` that by which `msformer segment --mask` makes its masks."""
    return rule_for(pair.colour, is_ct(case.image, _reading(case))) if rule == AUTO else rule


def _reading(case: Case) -> Reading:
    return Reading(case.window, case.slice_index, case.modality)


def read_mask(path: Path, slice_index: int | None = None) -> Mask:
    """``[H, W]``: what is not 0; in a JPEG, whose black is not quite, what is brighter than half; in a picture of one
    colour whose alpha channel is not, what is opaque.
    """
    if is_medical(path):
        return _anything(read_slice(path, slice_index, _LABELS).pixels)
    pixels: NDArray[Any] = read_image(path)
    alpha = read_alpha(path) if (pixels == pixels[:1, :1]).all() else None
    if alpha is not None and alpha.min() < alpha.max():
        return alpha > 127
    return _anything(pixels > (127 if path.suffix.lower() in (".jpg", ".jpeg") else 0))


def _anything(pixels: NDArray[Any]) -> Mask:
    """What is not 0, in one channel or several."""
    return np.asarray(pixels.reshape(*pixels.shape[:2], -1).any(axis=2))


def turned_like(mask: Mask, stored: Geometry, picture: Geometry, path: Path) -> Mask:
    """A mask ``[h, w]``, turned and mirrored until it lies in the world as a picture does.

    Raises:
        ValueError: the mask was cut in another plane; or its voxels have another order than those of the picture, and
            the positions that would justify it do not agree.
    """
    from nibabel import orientations

    found, wanted = _picture_affine(stored), _picture_affine(picture)
    turn = orientations.ornt_transform(*(orientations.io_orientation(affine) for affine in (found, wanted)))
    if turn[2, 0] != 2:
        raise ValueError(f"{path}: the mask was cut in another plane than the image")
    volume = mask.T[:, :, None]
    distance = np.linalg.norm((found @ orientations.inv_ornt_aff(turn, volume.shape) - wanted)[:3, 3])
    orders = ["".join(orientations.aff2axcodes(geometry.affine)) for geometry in (stored, picture)]
    if orders[0] != orders[1] and distance > np.linalg.norm(wanted[:3, :2], axis=0).sum():
        raise ValueError(
            f"{path}: the voxels of the mask are in the order {orders[0]}, those of the image in {orders[1]}, "
            f"and their corners are {distance:.3g} mm apart"
        )
    return np.asarray(orientations.apply_orientation(volume, turn)[:, :, 0].T)


def _picture_affine(geometry: Geometry) -> NDArray[np.float64]:
    """``[4, 4]``, from column, row and 0 of a picture to positions in mm."""
    from nibabel import orientations

    corner = np.eye(4)
    corner[:3, 3] = [part.start for part in geometry.place]
    shape = [part.stop - part.start for part in geometry.place]
    return np.asarray(geometry.affine @ corner @ orientations.inv_ornt_aff(geometry.orientation, shape))
