"""Which labels of a map are the object, when there is no mask to ask: rules that look at the image and the map only.

- ``central``: labels that cover more of the middle of the image than of its border.
- ``dark``: labels that are dark, where they lie in the middle. Where what is dark lies around the middle, the object is
  those parts of it that do not; without such parts it is found as by ``central``.
- ``lesion``: ``dark``, and around it what has not yet faded into the skin; for dermoscopy. Where the border of a lesion
  is drawn is a matter of the image more than of the label map, and those who draw it include the fading.
- ``lung``: labels that are dark within the body, for CT slices through the chest. Outside air and lung often share a
  label; `body_mask` tells them apart.

All end with `clean_up`. A map of one label leaves nothing to choose: the object is everything, or for ``lung`` nothing
where there is no body. docs/evaluation.md has what each is worth on which images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu
from skimage.morphology import disk
from torch import Tensor

Mask = NDArray[np.bool_]
Rule = Callable[[NDArray[Any], Tensor], Mask]

RIM = 0.015
"""Of the image's side: what is not looked at, since networks that pad with zeros give the rim a label of its own."""
BORDER = 0.08
"""Of the image's side: where the border ends."""
SPREAD = 0.5
"""Standard deviation of the weights of the middle, of half the image's side."""
FADING = 1.1
"""Of Otsu's threshold: lesions fade out, and those who draw their masks include the fading."""
VESSEL = 0.003
"""Of the image: holes in the lungs that are not larger are vessels, and part of them."""
REACH = 0.045
"""Of the image's side: how far from the dark part a lesion may fade."""
AROUND = 0.1
"""Of the image's side: skin is what is farther than `REACH` from the dark part, and nearer than this."""
FADED = 0.2
"""Of the contrast between lesion and skin: what is darker than skin by less is skin."""
GAP = 0.004
"""Of the image's side: half the width of gaps in the texture of a lesion."""
HAIR = 0.012
"""Of the image's side: half the width of hairs, at most."""
LEAST_PART = 0.3
"""Parts of the object with less than this share of the weight of the largest are specks."""


def select(rule: str, labels: NDArray[Any], image: Tensor) -> Mask:
    """The object ``[h, w]`` in a label map ``[h, w]`` of an image ``[3, h, w]`` with values in [0, 1].

    Raises:
        ValueError: an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"select: unknown rule {rule!r}; expected one of {', '.join(RULES)}")
    if labels.min() == labels.max() and not (rule == "lung" and not body_mask(image).any()):
        return np.ones(labels.shape, dtype=np.bool_)
    return RULES[rule](labels, image)


def central(labels: NDArray[Any], image: Tensor) -> Mask:
    """Labels with a larger share of the middle than of the border. The image is not looked at."""
    return clean_up(np.isin(labels, _central(labels)))


def _central(labels: NDArray[Any]) -> list[int]:
    """There is always one: both shares add up to 1 over all labels; where all are equal, the first."""
    excess = _excess(labels)
    return [v for v, e in excess.items() if e > 0] or [max(excess, key=lambda v: excess[v])]


def _excess(labels: NDArray[Any]) -> dict[int, float]:
    """The share of the middle that a label covers, less its share of the border."""
    difference = _middle(labels.shape) - _border(labels.shape)
    return {int(v): float(difference[labels == v].sum()) for v in np.unique(labels)}


def dark(labels: NDArray[Any], image: Tensor) -> Mask:
    """Labels whose mean, weighted with the middle, is at most Otsu's threshold, or at most `FADING` times that where
    they cover more of the middle than of the border; the darkest if there is none. Hairs are left out. If what is left
    lies around the middle, as shaded skin does, the object is those parts of it that do not; if there are none, it is
    not dark, and found as by `central`.
    """
    grey, middle = grey_levels(image), _middle(labels.shape)
    means = {int(v): np.average(grey[labels == v], weights=middle[labels == v]) for v in np.unique(labels)}
    threshold, excess = threshold_otsu(grey), _excess(labels)
    limits = {v: threshold * (FADING if excess[v] > 0 else 1) for v in means}
    found = [v for v in means if means[v] <= limits[v]] or [min(means, key=lambda v: means[v])]
    parts = main_parts(without_hairs(np.isin(labels, found)))
    if True in _central(parts):
        return filled(parts)
    numbered, _ = ndimage.label(parts)
    inner = [part for part in _central(numbered) if part]
    return filled(np.isin(numbered, inner)) if inner else central(labels, image)


def lesion(labels: NDArray[Any], image: Tensor) -> Mask:
    """`dark`, with the pixels near it that are connected to it and darker than the skin around by `FADED` of the
    contrast; medians tell the grey values of lesion and skin. A sharp border stays where it is.
    """
    found, grey = dark(labels, image), grey_levels(image).astype(np.float64)
    away = ndimage.distance_transform_edt(~found) / np.mean(found.shape)
    around = grey[(away > REACH) & (away <= AROUND)]
    skin, contrast = (np.median(around), np.median(around) - np.median(grey[found])) if around.size else (0, 0)
    if contrast <= 0:
        return found
    limit = skin - FADED * contrast
    parts, _ = ndimage.label(found | ((away <= REACH) & (grey < limit)))
    return filled(np.isin(parts, np.unique(parts[found])))


def lung(labels: NDArray[Any], image: Tensor) -> Mask:
    """Within the body of a CT slice, labels that are no brighter there than Otsu's threshold."""
    body, grey = body_mask(image), grey_levels(image)
    if not body.any():
        return np.zeros(labels.shape, dtype=np.bool_)
    threshold = threshold_otsu(grey[body])
    found = [v for v in np.unique(labels[body]) if grey[body & (labels == v)].mean() <= threshold]
    return clean_up(np.isin(labels, found) & body, VESSEL)


RULES: dict[str, Rule] = {"central": central, "dark": dark, "lesion": lesion, "lung": lung}


AUTO = "auto"
"""In place of a rule: that of `rule_for`."""


def rule_for(colour: bool, ct: bool) -> str:
    """The rule that did best on images of this kind: `lesion` on photographs of skin, `lung` on CT slices of the chest;
    for others `central`, which assumes least.
    """
    return "lesion" if colour else "lung" if ct else "central"


def largest_hole(rule: str) -> float:
    """Holes in the object of a rule are filled that are no larger than this share of the image."""
    return VESSEL if rule == "lung" else 1.0


def grey_levels(image: Tensor) -> NDArray[np.uint8]:
    """``[3, h, w]`` in [0, 1] -> ``[h, w]``: mean of the channels in 256 levels, as Otsu's threshold counts them."""
    return (image.mean(0) * 255).round().to(torch.uint8).numpy()


def body_mask(image: Tensor) -> Mask:
    """Of a CT slice ``[3, h, w]`` whose air is dark: the body with what is in it, without the table, ``[h, w]``.

    The largest part brighter than Otsu's threshold that thin things were taken off from, with its holes filled.
    """
    grey = grey_levels(image)
    thin = max(1, round(min(grey.shape) / 100))
    parts, count = ndimage.label(ndimage.binary_opening(grey > threshold_otsu(grey), iterations=thin))
    if count == 0:
        return np.zeros(grey.shape, dtype=np.bool_)
    largest = parts == 1 + np.argmax(ndimage.sum_labels(parts > 0, parts, range(1, count + 1)))
    margin = 2 * thin
    closed = ndimage.binary_closing(np.pad(largest, margin), iterations=margin)[margin:-margin, margin:-margin]
    return np.asarray(ndimage.binary_fill_holes(closed), dtype=np.bool_)


def clean_up(mask: Mask, largest: float = 1.0) -> Mask:
    """The mask without specks, and with holes filled that are no larger than this share of the image."""
    return filled(main_parts(mask), largest)


def without_hairs(mask: Mask) -> Mask:
    """The mask without what is as thin as a hair: dark hairs join a lesion with dark corners, and with each other, so
    that all of the image is a hole to fill.

    Narrow gaps are closed before, or lesions of a loose texture would go with the hairs. A mask of hairs alone stays.
    """
    gap, hair = (max(1, round(share * np.mean(mask.shape))) for share in (GAP, HAIR))
    padded = np.pad(mask, 2 * hair, mode="edge")
    closed = ndimage.binary_closing(padded, np.ones((2 * gap + 1, 2 * gap + 1)))
    opened = ndimage.binary_opening(closed, disk(hair))[2 * hair : -2 * hair, 2 * hair : -2 * hair]
    return opened if opened.any() else mask


def main_parts(mask: Mask) -> Mask:
    """The mask without specks, judged by their share of the middle of the image; its rim is that of what lies next to
    it.
    """
    kept = mask[_inner(mask.shape)]
    parts, count = ndimage.label(kept)
    if count > 1:
        weights = ndimage.sum_labels(_middle(kept.shape), parts, range(1, count + 1))
        kept = np.isin(parts, 1 + np.flatnonzero(weights >= LEAST_PART * weights.max()))
    return np.pad(kept, [(_rim(size), _rim(size)) for size in mask.shape], mode="edge")


def filled(mask: Mask, largest: float = 1.0) -> Mask:
    """The mask with holes filled that are no larger than this share of the image."""
    holes, _ = ndimage.label(ndimage.binary_fill_holes(mask) & ~mask)
    return mask | ((holes > 0) & (np.bincount(holes.ravel())[holes] <= largest * mask.size))


def _middle(shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Weights that fall off from the middle as a Gaussian; their sum is 1."""
    axes = [(np.arange(size) + 0.5) / size * 2 - 1 for size in shape]
    weights = np.exp(-(axes[0][:, None] ** 2 + axes[1][None] ** 2) / (2 * SPREAD**2))
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def _border(shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Equal weights of the pixels near the edges, but for the rim; their sum is 1."""
    weights = np.zeros(shape)
    for value, widths in ((1, [_rim(size) for size in shape]), (0, [max(1, round(BORDER * size)) for size in shape])):
        weights[widths[0] : shape[0] - widths[0], widths[1] : shape[1] - widths[1]] = value
    return weights / weights.sum()


def _rim(size: int) -> int:
    return round(RIM * size)


def _inner(shape: tuple[int, ...]) -> tuple[slice, ...]:
    """What is looked at: all but the rim."""
    return tuple(slice(_rim(size), size - _rim(size)) for size in shape)
