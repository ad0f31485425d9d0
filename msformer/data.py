"""Images in, under the name that other code imports them by; they are in `msformer.io`."""

from msformer.io.files import SUFFIXES, find_images, plain_name
from msformer.io.prepare import nearest, prepare_image, resize_image, resize_labels
from msformer.io.read import Reading, is_colour, is_ct, read_image

__all__ = [
    "SUFFIXES",
    "Reading",
    "find_images",
    "is_colour",
    "is_ct",
    "nearest",
    "plain_name",
    "prepare_image",
    "read_image",
    "resize_image",
    "resize_labels",
]
