"""Images and true masks as arrays, pixel on pixel.

A NIfTI mask lies on its image by the positions that both files give, not by the order of their voxels; that of a DICOM
picture is turned like the picture. Positions that only differ by a shift or a scale are taken for the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from msformer.evaluation.layouts import Case
from msformer.evaluation.masks import MODALITY, LabelNeeded, Truth, read_mask, read_truth, truth_of
from msformer.io.base import Geometry, Notes, Slice
from msformer.io.medical import is_medical, read_slice
from msformer.io.nifti import is_volume
from msformer.io.ordinary import read_raster
from msformer.io.prepare import prepare_image
from msformer.io.raster import Raster, turn_upright
from msformer.io.read import Reading, is_colour, is_ct, read_picture
from msformer.scoring import Mask
from msformer.selection import AUTO, rule_for

__all__ = ["Pair", "check_labels", "read_mask", "read_pair", "rule_of", "turned_like"]


@dataclass(frozen=True)
class Pair:
    """An image and its mask as arrays."""

    image: Tensor
    """``[3, H, W]``, float32 in [0, 1]."""
    truth: Mask
    """``[H, W]``."""
    colour: bool
    """False where the three channels are the same."""
    void: Mask | None = None
    """``[H, W]``, pixels of which the mask says that nobody knows; no score counts them. None: there are none."""
    read: Mapping[str, Any] = field(default_factory=dict)
    """How the image was read, as in the records of `msformer segment`; under ``masks`` what was assumed of masks."""


def read_pair(case: Case) -> Pair:
    """Raises ValueError or OSError where a file cannot be read, or the mask does not lie on the image."""
    picture = read_picture(case.image, _reading(case))
    image = prepare_image(picture.pixels)
    size = (image.shape[1], image.shape[2])
    paths = (case.mask, *case.more_masks)
    truths = [_placed(path, case, picture.slice, size) for path in paths]
    whole = np.any([truth.object for truth in truths], axis=0)
    voids = [truth.void for truth in truths if truth.void is not None]
    void = np.any(voids, axis=0) & ~whole if voids else None
    notes = [f"{path.name}: {note}" for path, truth in zip(paths, truths, strict=True) for note in truth.notes]
    return Pair(image, whole, is_colour(image), void, picture.facts | {"masks": notes})


def _placed(path: Path, case: Case, picture: Slice | None, size: tuple[int, int]) -> Truth:
    """A mask on its image, which has the given height and width."""
    if picture is not None and is_medical(path):
        labels = read_slice(path, case.slice_index, MODALITY)
        truth = truth_of(Raster(labels.pixels, notes=labels.notes), case.labels, path)
        placed = is_volume(case.image) or is_volume(path)
        if placed and labels.geometry is not None and picture.geometry is not None:
            places = labels.geometry, picture.geometry
            truth = truth.mapped(lambda part: turned_like(part, *places, path))
    else:
        truth = read_truth(path, case.slice_index, case.labels)
        if picture is None and not is_medical(path) and truth.object.shape == size[::-1] != size:
            truth = _turned_with_its_image(truth, path, case.image)
    if truth.object.shape != size:
        sizes = (" x ".join(map(str, shape)) for shape in (truth.object.shape, size))
        raise ValueError(f"{path}: the mask has {next(sizes)} pixels, the image {next(sizes)}")
    return truth


def _turned_with_its_image(truth: Truth, path: Path, image: Path) -> Truth:
    """A mask that was made on the picture as stored, by a program that does not know EXIF, turned as that is."""
    turn = read_raster(image).orientation
    if turn in (5, 6, 7, 8) and read_raster(path).orientation == 1:
        notes = Notes(path, list(truth.notes))
        notes.warn("the mask is turned as the EXIF of its image says")
        return replace(truth.mapped(lambda part: turn_upright(part, turn)), notes=tuple(notes.sentences))
    return truth


def check_labels(cases: Sequence[Case]) -> None:
    """That the labels of the object are known for each mask, before anything is made. Files that cannot be read are
    left for the run to name.

    Raises:
        LabelNeeded: a mask has several labels, and none was asked for.
        ValueError: no mask has a label that was asked for.
    """
    failed = ""
    for case in cases:
        for path in (case.mask, *case.more_masks):
            try:
                found = read_truth(path, case.slice_index, case.labels).object.any()
            except LabelNeeded:
                raise
            except (ValueError, OSError) as error:
                failed = failed or str(error)
                continue
            if found and case.labels:
                return
    if cases and cases[0].labels:
        asked, path = ", ".join(map(str, cases[0].labels)), cases[0].mask
        reason = failed or f"such as {path}{_labels_in(cases[0])}"
        raise ValueError(f"label: none of {len(cases)} masks has label {asked}: {reason}")


def _labels_in(case: Case) -> str:
    try:
        read_truth(case.mask, case.slice_index)
    except LabelNeeded as error:
        return f", which {str(error).partition(': ')[2].partition(';')[0]}"
    except (ValueError, OSError):
        pass
    return ""


def rule_of(case: Case, pair: Pair, rule: str) -> str:
    """The rule of the blind score, or instead of ``"auto"`` that by which `msformer segment --mask` makes its masks."""
    return rule_for(pair.colour, is_ct(case.image, _reading(case))) if rule == AUTO else rule


def _reading(case: Case) -> Reading:
    return Reading(case.window, case.slice_index, case.modality)


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
