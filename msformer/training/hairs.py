"""Taking hairs out of dermoscopic images: thin dark lines are found and painted over with what lies beside them.

After Lee, Ng, Gallagher, Coldman, McLean, "DullRazor: a software approach to hair removal from images", Computers in
Biology and Medicine 1997: closings with lines of several directions remove what is dark and thinner than a line is
long, in at least one of them; where that changes much, along something long, there is a hair.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.draw import line
from skimage.measure import label, regionprops

THICKEST = 0.035
"""Of the image's side: what is wider than this is no hair."""
DIRECTIONS = 8
CONTRAST = 0.05
"""A hair is darker than what lies beside it by this much, of values in [0, 1]."""
LENGTH = 0.1
"""Of the image's side: hairs are at least this long."""
SURROUNDINGS = 0.02
"""Of the image's side: standard deviation of the weights of what hairs are painted over with."""


def without_hairs(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """An image ``[H, W, 3]`` with values in [0, 1], with its hairs painted over; the same array if it has none."""
    hairs = find_hairs(image.mean(2))
    if not hairs.any() or hairs.all():
        return image
    sigma = (max(1.0, SURROUNDINGS * np.mean(hairs.shape)),) * 2
    clear = (~hairs).astype(np.float32)
    weight = ndimage.gaussian_filter(clear, sigma)
    around = ndimage.gaussian_filter(image * clear[..., None], (*sigma, 0)) / np.maximum(weight, 1e-6)[..., None]
    return np.where(hairs[..., None] & (weight > 1e-6)[..., None], around, image).astype(np.float32)


def find_hairs(grey: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where the hairs of an image ``[H, W]`` with values in [0, 1] are."""
    side = float(np.mean(grey.shape))
    closed = np.max([ndimage.grey_closing(grey, footprint=shape) for shape in _lines(side)], axis=0)
    parts = label(closed - grey > CONTRAST, connectivity=2)
    long = [part.label for part in regionprops(parts) if part.axis_major_length >= LENGTH * side and _is_thin(part)]
    return ndimage.binary_dilation(np.isin(parts, long), np.ones((3, 3)))


def _is_thin(part: object) -> bool:
    """Whether a part covers less of its extent than a blob would; several hairs that cross are one part."""
    return part.area <= 0.25 * part.area_convex or part.axis_minor_length <= 0.2 * part.axis_major_length  # type: ignore[attr-defined]


def _lines(side: float) -> list[NDArray[np.bool_]]:
    """Lines of `THICKEST` through the middle of a square, one a direction."""
    reach = max(1, round(THICKEST * side / 2))
    found = []
    for angle in np.arange(DIRECTIONS) * np.pi / DIRECTIONS:
        row, column = round(reach * float(np.sin(angle))), round(reach * float(np.cos(angle)))
        shape = np.zeros((2 * reach + 1, 2 * reach + 1), dtype=np.bool_)
        shape[line(reach - row, reach - column, reach + row, reach + column)] = True
        found.append(shape)
    return found
