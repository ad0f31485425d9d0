"""What is object in the file of a true mask.

- A label image (whole numbers, several of which fill areas) is taken by the number: `--label N` says which, unless
  there is one. 255 beside lower numbers is void: nobody knows what is there, and no score counts it.
- A mask of 0 and one other number: the other. 0 is never object.
- A soft mask (smooth borders) or one that a lossy codec wrote: above the middle between its lowest and highest value;
  probabilities in floating point above 0.5.
- Where colours are the same all over what can be seen, alpha is the mask; else what is transparent is background.
- Colours: black is background. The colours of a palette are the numbers of a label image, grey ones are values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msformer.io.base import Notes
from msformer.io.medical import is_medical, read_slice
from msformer.io.ordinary import drop_extra_channels, read_raster
from msformer.io.raster import Raster
from msformer.scoring import Mask

Labels = tuple[int, ...] | None
"""The labels that are object; (): all but 0 and void; None: not said, which several labels do not allow."""
ALL = "all"
"""How the command line writes ()."""
VOID = 255
MODALITY = "SEG"
"""Of masks, as DICOM abbreviates it."""
_FEW = 32
"""Whole numbers that span less are labels, whatever their areas."""
_LISTED = 12


class LabelNeeded(ValueError):
    """A mask with several labels, none of which was asked for; the message lists them."""


@dataclass(frozen=True, eq=False)
class Truth:
    """What a mask says of each pixel."""

    object: Mask
    """``[H, W]``."""
    void: Mask | None = None
    """``[H, W]``, pixels of which nothing is known, none of which is object; None: there are none."""
    notes: tuple[str, ...] = ()
    """What was assumed or left out, a sentence each."""

    def mapped(self, change: Callable[[Mask], Mask]) -> Truth:
        """Both parts, changed."""
        return Truth(change(self.object), None if self.void is None else change(self.void), self.notes)


def parse_labels(texts: Sequence[str]) -> Labels:
    """Of the command line: numbers, colours such as ``#ff0000``, or ``all``; nothing is None.

    Raises:
        ValueError: something else.
    """
    if ALL in texts:
        return ()
    wrong = [text for text in texts if not re.fullmatch(r"\d+|#[0-9a-fA-F]{6}", text)]
    if wrong:
        raise ValueError(f"label: expected a number, a colour such as #ff0000, or {ALL}, got {wrong[0]!r}")
    return tuple(int(text[1:], 16) if text.startswith("#") else int(text) for text in texts) or None


def read_mask(path: Path, slice_index: int | None = None, labels: Labels = None) -> Mask:
    """The object of `read_truth`."""
    return read_truth(path, slice_index, labels).object


def read_truth(path: Path, slice_index: int | None = None, labels: Labels = None) -> Truth:
    """A mask file as it is shown.

    Raises:
        FileNotFoundError, PermissionError, ImageError: as for `msformer.io.read.read_image`.
        LabelNeeded: several labels, and none was asked for.
        ValueError: colours of which none is black; labels of a mask that has none.
    """
    if is_medical(path):
        found = read_slice(path, slice_index, MODALITY)
        return truth_of(Raster(found.pixels, notes=found.notes), labels, path)
    return truth_of(read_raster(path), labels, path)


def truth_of(raster: Raster, labels: Labels, path: Path) -> Truth:
    """What a decoded mask says; raises as `read_truth`."""
    notes = Notes(path, list(raster.notes))
    found = _truth_of(raster, labels, notes)
    return replace(found, notes=tuple(notes.sentences))


def _truth_of(raster: Raster, labels: Labels, notes: Notes) -> Truth:
    path = notes.path
    values, colours = _values(raster, path)
    if values.dtype.kind == "f":
        values = np.nan_to_num(values)
        if not raster.lossy and (values == np.rint(values)).all():
            values = values.astype(np.int64)
    if raster.lossy or values.dtype.kind == "f":
        if labels:
            raise ValueError(f"{path}: expected labels, got the values of a lossy or soft mask; leave out --label")
        if raster.lossy and 0 < values.max() < 16:
            notes.warn(f"the values up to {values.max()} of a lossy mask are taken for black")
        return Truth(_upper_half(values, raster.lossy))
    return _by_label(values, labels, colours, path)


def _values(raster: Raster, path: Path) -> tuple[NDArray[Any], bool]:
    """``[H, W]``: labels, grey values or opacities, 0 for background; and whether they are colours, as 0xRRGGBB."""
    pixels: NDArray[Any] = drop_extra_channels(raster.pixels, str(path))
    if raster.alpha is not None and raster.alpha.min() < raster.alpha.max():
        seen = pixels[raster.alpha > 0]
        if (seen == seen[:1]).all():
            return raster.alpha, False
        visible = raster.alpha if pixels.ndim == 2 else raster.alpha[..., None]
        pixels = np.where(visible > 0, pixels, 0)
    if pixels.ndim == 2:
        return pixels.astype(np.uint8) if pixels.dtype == np.bool_ else pixels, False
    if (pixels == pixels[..., :1]).all():
        return pixels[..., 0], False
    black = ~pixels.any(axis=2)
    if raster.indexes is not None and (not black.any() or not raster.indexes[black].any()):
        return raster.indexes, False
    if not raster.lossy and pixels.dtype == np.uint8:
        codes = pixels.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
        found, counts = np.unique(codes, return_counts=True)
        rare = ~np.isin(codes, found[np.argsort(counts)[-2:]])
        if len(found) == 2 or _fills_areas(codes, rare):
            if found[0] != 0 and len(found) == 2:
                listed = _listed(found, colours=True)
                raise ValueError(f"{path}: expected a black background, got the colours {listed}")
            return codes, True
    brightness = pixels.max(axis=2)
    if brightness.min() > 0.125 * brightness.max():
        raise ValueError(f"{path}: expected a black background in a mask of many colours, got none")
    return brightness, False


def _by_label(values: NDArray[Any], labels: Labels, colours: bool, path: Path) -> Truth:
    """Of whole numbers."""
    found = np.flatnonzero(np.bincount(values.ravel())) if values.dtype == np.uint8 else np.unique(values)
    others = found[(found != 0) & (found != VOID)]
    if labels:
        if colours and not np.isin(labels, found).any() and max(labels) < 256:
            listed = _listed(found, colours)
            raise ValueError(f"{path}: expected a --label of the colours {listed}, got {_listed(np.array(labels))}")
        unknown = found[-1] == VOID and VOID not in labels and not colours and not _are_greys(others)
        return Truth(np.isin(values, labels), values == VOID if unknown else None)
    has_void = not colours and found[-1] == VOID and others.size > 0 and others[-1] < _FEW
    several = others.size + (VOID in found and not has_void) > 1
    if several and not colours and not _are_labels(values, found):
        return Truth(_upper_half(values, lossy=False))
    if several and labels is None:
        listed = _listed(others if has_void else found[found != 0], colours)
        example = "'#rrggbb'" if colours else str(others[0])
        raise LabelNeeded(f"{path}: holds the labels {listed}; say which is the object: --label {example}, or {ALL}")
    void = values == VOID if has_void else None
    return Truth((values != 0) if void is None else (values != 0) & ~void, void)


def _are_greys(others: NDArray[Any]) -> bool:
    """Whether labels beside 255 are so spread between 0 and it that they can be told apart by eye: 128; 85 and 170."""
    steps = [others * parts / VOID for parts in range(2, 6)]
    return any(bool((np.abs(step - step.round()) < 0.02).all() and (step > 0.5).all()) for step in steps if step.size)


def _are_labels(values: NDArray[Any], found: NDArray[Any]) -> bool:
    """Whether all values fill areas, or those between the extremes do, rather than the slopes of a soft border."""
    low, high = int(found[0]), int(found[-1])
    if high - low < _FEW or np.isin(found, values[1:-1, 1:-1][_flat(values)]).all():
        return True
    margin = (high - low) / 16
    return _fills_areas(values, (values > low + margin) & (values < high - margin))


def _fills_areas(values: NDArray[Any], chosen: Mask) -> bool:
    """Whether a tenth of some pixels or more are flat."""
    return int((chosen[1:-1, 1:-1] & _flat(values)).sum()) > 0.1 * int(chosen.sum())


def _flat(values: NDArray[Any]) -> Mask:
    """``[H - 2, W - 2]``: whether an inner pixel has the value of all four neighbours."""
    inner = values[1:-1, 1:-1]
    neighbours = (values[:-2, 1:-1], values[2:, 1:-1], values[1:-1, :-2], values[1:-1, 2:])
    return np.logical_and.reduce([neighbour == inner for neighbour in neighbours])


def _upper_half(values: NDArray[Any], lossy: bool) -> Mask:
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        return np.asarray(values > 0.5)
    if lossy and high - low < 16:  # the noise of one colour
        return np.asarray(values > 127)
    return np.asarray(values > (low + high) / 2)


def _listed(labels: NDArray[Any], colours: bool = False) -> str:
    texts = [f"#{label:06x}" if colours else str(label) for label in labels[:_LISTED].tolist()]
    return ", ".join([*texts, f"and {len(labels) - _LISTED} more"] if len(labels) > _LISTED else texts)
