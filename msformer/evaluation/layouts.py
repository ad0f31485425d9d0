"""Where data sets keep images and masks, and pairs of them as arrays.

- ``ph2``: ``IMDxxx/IMDxxx_Dermoscopic_Image/IMDxxx.bmp`` with ``IMDxxx/IMDxxx_lesion/IMDxxx_lesion.bmp``.
- ``lung``: ``2d_images/*.tif`` (Hounsfield units) with ``2d_masks/`` of the same names ("Finding and Measuring Lungs
  in CT Data").
- ``isic``: ``*.jpg`` with ``*_Segmentation.png``, in one folder or in two.
- ``pairs``: a folder ``images`` with a folder ``masks``, of the same names without suffix; or any two folders or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from msformer.data import Reading, find_images, plain_name, prepare_image, read_image
from msformer.medical import count_slices, is_medical, is_volume, read_slice, slices_with_labels
from msformer.scoring import Mask

LUNG_WINDOW = (-512.0, 512.0)
"""Hounsfield units that become black and white."""
IMAGE_FOLDERS = ("images", "image", "imgs", "2d_images")
MASK_FOLDERS = ("masks", "mask", "labels", "annotations", "ground_truth", "2d_masks")
_MASK_ENDINGS = ("_segmentation", "_mask", "_lesion", "_label", "_gt")


@dataclass(frozen=True)
class Case:
    """An image file and its mask."""

    name: str
    image: Path
    mask: Path
    window: tuple[float, float] | None = None
    """Values that become black and white; None: as `msformer.segment` takes the file."""
    slice_index: int | None = None
    """Of NIfTI volumes, as `msformer.medical.read_nifti` counts."""


@dataclass(frozen=True)
class Pair:
    """An image and its mask as arrays."""

    image: Tensor
    """``[3, H, W]``, float32 in [0, 1]."""
    truth: Mask
    """``[H, W]``."""
    colour: bool
    """False where the three channels are the same."""


@dataclass(frozen=True)
class Found:
    """The cases of a data set, and a line for each file that is not part of one."""

    layout: str
    cases: tuple[Case, ...]
    problems: tuple[str, ...]


def find_cases(data: Path, layout: str = "auto", masks: Path | None = None) -> Found:
    """The images below a folder and their masks.

    Args:
        data: a folder, or with `masks` an image.
        layout: ``"auto"``, or a key of `LAYOUTS`.
        masks: a folder or file of masks, for layout ``pairs``.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: an unknown layout, no image with a mask, or two masks for one image.
    """
    for path in (data, masks):
        if path is not None and not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
    if layout not in ("auto", *LAYOUTS):
        raise ValueError(f"layout: unknown {layout!r}; expected auto, {', '.join(LAYOUTS)}")
    if masks is not None:
        if layout not in ("auto", "pairs"):
            raise ValueError(f"masks: is for layout pairs, not {layout}")
        names = ["pairs"]
    else:
        names = list(LAYOUTS) if layout == "auto" else [layout]
    for name in names:
        found = Found(name, *_split(LAYOUTS[name](data, masks)))
        if found.cases:
            return found
    reasons = f": {'; '.join(found.problems[:5])}" if found.problems else ""
    raise ValueError(f"{data}: no image with a mask in layout {' or '.join(names)}{reasons}")


def _split(entries: Iterator[Case | str]) -> tuple[tuple[Case, ...], tuple[str, ...]]:
    listed = list(entries)
    cases = sorted((e for e in listed if isinstance(e, Case)), key=lambda case: case.name)
    return tuple(cases), tuple(e for e in listed if isinstance(e, str))


def _ph2(data: Path, masks: Path | None) -> Iterator[Case | str]:
    for folder in sorted(data.rglob("*_Dermoscopic_Image")):
        name = folder.name.removesuffix("_Dermoscopic_Image")
        image, mask = folder / f"{name}.bmp", folder.parent / f"{name}_lesion" / f"{name}_lesion.bmp"
        yield from _case_or_problem(name, image, mask)


def _case_or_problem(name: str, image: Path, mask: Path) -> Iterator[Case | str]:
    missing = [path for path in (image, mask) if not path.exists()]
    yield f"{missing[0]}: missing" if missing else Case(name, image, mask)


def _lung(data: Path, masks: Path | None) -> Iterator[Case | str]:
    if not (data / "2d_images").is_dir() or not (data / "2d_masks").is_dir():
        return
    for entry in _paired(data / "2d_images", data / "2d_masks"):
        yield entry if isinstance(entry, str) else Case(entry.name, entry.image, entry.mask, LUNG_WINDOW)


def _isic(data: Path, masks: Path | None) -> Iterator[Case | str]:
    files = find_images([data])
    segmentations = [f for f in files if plain_name(f).lower().endswith("_segmentation")]
    if segmentations:
        yield from _matched([f for f in files if f not in segmentations], segmentations)


def _pairs(data: Path, masks: Path | None) -> Iterator[Case | str]:
    if masks is not None:
        yield from _paired(data, masks)
        return
    folders = [next((data / n for n in names if (data / n).is_dir()), None) for names in (IMAGE_FOLDERS, MASK_FOLDERS)]
    if folders[0] is not None and folders[1] is not None:
        yield from _paired(folders[0], folders[1])


def _paired(images: Path, masks: Path) -> Iterator[Case | str]:
    if images.is_file() and masks.is_file():
        yield from _slices(Case(plain_name(images), images, masks))
        return
    inside = masks if masks.is_dir() and masks.resolve().is_relative_to(images.resolve()) else None
    yield from _matched(find_images([images], exclude=inside), find_images([masks]))


def _slices(case: Case) -> Iterator[Case | str]:
    """Of a volume, the slices with a mask; any other case as it is."""
    if not is_volume(case.mask) or count_slices(case.mask) == 1:
        yield case
        return
    found = slices_with_labels(case.mask)
    if not found:
        yield f"{case.mask}: the mask is empty"
    for index in found:
        yield replace(case, name=f"{case.name}-slice-{index:03d}", slice_index=index)


def _key(path: Path) -> str:
    """The name that an image and its mask share."""
    stem = plain_name(path).lower()
    return next((stem.removesuffix(ending) for ending in _MASK_ENDINGS if stem.endswith(ending)), stem)


def _matched(images: list[Path], masks: list[Path]) -> Iterator[Case | str]:
    by_key: dict[str, Path] = {}
    for mask in masks:
        if _key(mask) in by_key:
            raise ValueError(f"{mask}: a mask of the same name is {by_key[_key(mask)]}")
        by_key[_key(mask)] = mask
    seen: dict[str, Path] = {}
    for image in images:
        key = plain_name(image).lower()
        if key in seen:
            raise ValueError(f"{image}: an image of the same name is {seen[key]}")
        seen[key] = image
        mask_of_it = by_key.pop(key, None)
        if mask_of_it is None:
            yield f"{image}: has no mask"
        else:
            yield from _slices(Case(plain_name(image), image, mask_of_it))
    for mask in by_key.values():
        yield f"{mask}: has no image"


LAYOUTS: dict[str, Callable[[Path, Path | None], Iterator[Case | str]]] = {
    "ph2": _ph2,
    "lung": _lung,
    "isic": _isic,
    "pairs": _pairs,
}


def read_pair(case: Case) -> Pair:
    """Raises ValueError or OSError where a file cannot be read, or sizes differ."""
    image = prepare_image(read_image(case.image, Reading(case.window, case.slice_index)))
    truth = read_mask(case.mask, case.slice_index)
    if truth.shape != tuple(image.shape[1:]):
        sizes = " x ".join(map(str, truth.shape)), " x ".join(map(str, image.shape[1:]))
        raise ValueError(f"{case.mask}: the mask has {sizes[0]} pixels, the image {sizes[1]}")
    return Pair(image, truth, colour=not bool((image[0] == image[1]).all() and (image[0] == image[2]).all()))


def read_mask(path: Path, slice_index: int | None = None) -> Mask:
    """``[H, W]``: what is not 0; in a JPEG, whose black is not quite, what is brighter than half."""
    if is_medical(path):
        stored = read_slice(path, slice_index).pixels
        return np.asarray(stored.reshape(*stored.shape[:2], -1).any(axis=2))
    pixels: NDArray[Any] = read_image(path)
    least = 127 if path.suffix.lower() in (".jpg", ".jpeg") else 0
    mask: Mask = pixels > least
    return np.asarray(mask.any(axis=2)) if mask.ndim == 3 else mask
