"""Segmenting many image files into a folder: names, records, resuming, pictures, summary.

For an image ``sub/name.jpg`` the folder gets ``sub/name.labels.png`` (indexed), ``sub/name.overlay.png``, with a rule
for masks ``sub/name.mask.png`` (0 and 255), and ``sub/name.json``, the record of how it was made. For a DICOM or NIfTI
file label map and mask are written as ``.nii.gz`` too, on the voxels of the input; there label k is k + 1, as 0 is
what was not segmented. Where all slices of a volume are segmented, each is an image of its own, ``name-slice-012``, and
the ``.nii.gz`` of ``name`` holds them all. A record is written last, so that an image with a record is complete. An
image whose record has the same settings and the same input (by content) is not segmented again.
"""

from msformer.runs.write import display_image, object_mask

__all__ = ["display_image", "object_mask"]
