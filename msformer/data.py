"""Images in, under the name that other code imports them by; they are in `msformer.io`."""

from msformer.io.files import SUFFIXES, find_images, plain_name
from msformer.io.ordinary import TIFF_SIGNATURES, read_alpha
from msformer.io.prepare import nearest, prepare_image, resize_image, resize_labels
from msformer.io.read import Reading, is_colour, is_ct, read_image

__all__ = [
    "SUFFIXES",
    "TIFF_SIGNATURES",
    "Reading",
    "find_images",
    "is_colour",
    "is_ct",
    "nearest",
    "plain_name",
    "prepare_image",
    "read_alpha",
    "read_image",
    "resize_image",
    "resize_labels",
]
