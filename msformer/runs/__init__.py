"""Segmenting many image files into a folder: names, records, resuming, pictures, summary.

For an image ``sub/name.jpg`` the folder gets ``sub/name.labels.png`` (indexed), ``sub/name.overlay.png``, with a rule
for masks ``sub/name.mask.png`` (0 and 255), with a trained model ``sub/name.probability.png`` (0 to 255), and
``sub/name.json``, the record of how it was made. For a DICOM or NIfTI file all but the overlay are written as
``.nii.gz`` too, on the voxels of the input; there label k is k + 1, as 0 is what was not segmented, and probabilities
are floats from 0 to 1. Where all slices of a volume are segmented, each is an image of its own, ``name-slice-012``, and
the ``.nii.gz`` of ``name`` holds them all. A record is written last, so that an image with a record is complete. An
image whose record has the same settings and the same input (by content) is not segmented again.
"""

from msformer.runs.ways import object_mask
from msformer.runs.write import display_image

__all__ = ["display_image", "object_mask"]
