"""Medical files in and out: DICOM through pydicom, NIfTI through nibabel, label maps as NIfTI on the input's voxels.

Both kinds become a `Slice`: one picture with the values in the modality's own units. A DICOM picture is shown as
stored. A NIfTI slice is turned to the way radiologists look at it: an axial one has the front of the patient at the
top and the patient's right at the left, so that it looks like the axial DICOM picture of the same patient.

World positions are in mm in NIfTI's RAS+ convention: x to the patient's right, y to the front, z to the head. DICOM's
are LPS+: x and y the other way round.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msformer.output import complete_file


class ImageError(ValueError):
    """A file that is not a usable image; the message names it and says why."""


SUFFIXES_MEDICAL = (".dcm", ".dicom", ".nii", ".nii.gz")

Window = tuple[float, float]

CT_WINDOW = (-512.0, 512.0)  # Hounsfield units
AIR = -500.0  # Hounsfield units; only CT has values this low
_SUFFIXES_NIFTI = (".nii", ".nii.gz")
_IDENTITY = np.array([[0, 1], [1, 1], [2, 1]])
# by the world axis that the slices follow: where the picture's columns, its rows and the slices go
_DISPLAY = ("PIR", "LIA", "LPS")
_MONOCHROME = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_GEOMETRY_FIELDS = (
    *("pixdim", "xyzt_units", "qform_code", "sform_code", "srow_x", "srow_y", "srow_z"),
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
)


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where a slice lies in its volume, and the volume in the world: what is needed to write labels back.

    Attributes:
        affine: float64 [4, 4], from voxel indexes of the volume to RAS+ positions in mm.
        shape: the volume's shape as stored, 2 or more axes; those after the third have length 1.
        place: the slice in the volume's first three axes.
        orientation: [3, 2] as in nibabel.orientations, from the volume's axes to columns, rows and slices as shown.
        header: of a NIfTI file; None for DICOM.
    """

    affine: NDArray[np.float64]
    shape: tuple[int, ...]
    place: tuple[slice, ...]
    orientation: NDArray[Any]
    header: Any = None


@dataclass(frozen=True, eq=False)
class Slice:
    """One picture of a medical file.

    Attributes:
        pixels: float32 [H, W] in the modality's units (Hounsfield units for CT), or uint8 [H, W, 3].
        window: the lowest and highest value to show, as the file says; None if it says nothing.
        geometry: None where a label map will not be written back.
        modality: as DICOM abbreviates it, such as "CT" or "MR"; "" if it is not known.
        inverted: whether low values are bright (MONOCHROME1).
    """

    pixels: NDArray[Any]
    window: Window | None = None
    geometry: Geometry | None = None
    modality: str = ""
    inverted: bool = False


def is_dicom(path: str | PathLike[str]) -> bool:
    """Whether the file has DICOM's signature after the preamble; False for what cannot be opened."""
    try:
        with Path(path).open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def is_medical(path: str | PathLike[str]) -> bool:
    """Whether the path has a suffix of DICOM or NIfTI, or is a DICOM file by its content."""
    return Path(path).name.lower().endswith(SUFFIXES_MEDICAL) or is_dicom(path)


def is_volume(path: str | PathLike[str]) -> bool:
    """Whether the path has a suffix of NIfTI."""
    return Path(path).name.lower().endswith(_SUFFIXES_NIFTI)


def count_slices(path: str | PathLike[str]) -> int:
    """How many slices `read_nifti` can read from the file; 1 for DICOM.

    Raises:
        FileNotFoundError, PermissionError: as the system says, naming the file.
        ImageError: as for `read_nifti`.
    """
    path = Path(path)
    if not is_volume(path):
        return 1
    with _decoding(path, "NIfTI"):
        image = _open_nifti(path)
        return _volume_shape(image.shape)[_slice_axis(image)]


def slices_with_labels(path: str | PathLike[str]) -> list[int]:
    """The indexes of a NIfTI file's slices, as `read_nifti` counts them, that hold anything but 0.

    Raises:
        FileNotFoundError, PermissionError, ImageError: as for `read_nifti`.
    """
    path = Path(path)
    with _decoding(path, "NIfTI"):
        image = _open_nifti(path)
        axis = _slice_axis(image)
        volume = np.asarray(image.dataobj).reshape(_volume_shape(image.shape))
        filled = np.flatnonzero(volume.any(axis=tuple(a for a in range(3) if a != axis)))
        forward = _display_orientation(image, axis)[axis, 1] > 0
        return sorted(int(i) if forward else volume.shape[axis] - 1 - int(i) for i in filled)


@contextmanager
def _package(name: str, path: Path) -> Iterator[None]:
    """Around an import: says what to install when the package is missing."""
    try:
        yield
    except ImportError as error:
        raise ImageError(f'{path}: needs the package {name}: pip install "msformer[medical]"') from error


@contextmanager
def _decoding(path: Path, kind: str) -> Iterator[None]:
    """Turns whatever a decoder raises on a damaged file into ImageError."""
    try:
        path.open("rb").close()  # the packages hide why a file cannot be opened
        yield
    except (ImageError, FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:
        raise ImageError(f"{path}: damaged or unsupported {kind} file: {error}") from error


def read_dicom(path: str | PathLike[str]) -> Slice:
    """The picture of a DICOM file with one frame, as stored: rows top to bottom, not turned.

    Rescaling (or the modality look-up table) is applied. Padding gets the darkest value of the other pixels: the
    lowest, or with MONOCHROME1, which `show` inverts, the highest. YBR and palettes become RGB, of 8 bits. Without a
    position, the picture is taken as axial, its first pixel at 0.

    Raises:
        FileNotFoundError, PermissionError: as the system says, naming the file.
        ImageError: not DICOM, damaged, no picture or several, pixels that cannot be decoded, pydicom missing.
    """
    path = Path(path)
    with _package("pydicom", path):
        import pydicom
        import pydicom.pixels
    with _decoding(path, "DICOM"):
        if not is_dicom(path):
            raise ImageError(f"{path}: not a DICOM file")
        dataset = pydicom.dcmread(path)
        _spread_functional_groups(dataset)
        stored = _stored_pixels(dataset, path)
        grey, inverted = stored.ndim == 2, dataset.PhotometricInterpretation == "MONOCHROME1"
        pixels = _grey(dataset, stored, inverted) if grey else _colour(dataset, stored)
        if not np.isfinite(pixels).all():
            raise ImageError(f"{path}: holds NaN or infinite values")
        geometry = _dicom_geometry(dataset, pixels.shape[0], pixels.shape[1])
        window = _dicom_window(dataset) if grey else None
        return Slice(pixels, window, geometry, str(dataset.get("Modality") or ""), inverted)


def read_slice(path: str | PathLike[str], index: int | None = None) -> Slice:
    """`read_nifti` or `read_dicom`, by the name of the file; raises ImageError for an index of a DICOM file but 0."""
    if is_volume(path):
        return read_nifti(path, index)
    if index not in (None, 0):
        raise ImageError(f"{path}: a DICOM file has one slice, got index {index}")
    return read_dicom(path)


def show(slice: Slice, window: Window | None = None) -> NDArray[np.uint8]:
    """The picture in 8 bits, ``[H, W]`` or ``[H, W, 3]``, within a window, by default `default_window`."""
    low, high = default_window(slice) if window is None else window
    if slice.pixels.ndim == 3:
        return slice.pixels
    shown = apply_window(slice.pixels, low, high)
    return 255 - shown if slice.inverted else shown


def _spread_functional_groups(dataset: Any) -> None:
    """Puts what enhanced objects say in functional groups where ordinary objects say it; of several frames, the
    first's."""
    for keyword in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in (dataset.get(keyword) or [])[:1]:
            for macro in group:
                for element in macro.value[0] if macro.VR == "SQ" and macro.value else ():
                    dataset.setdefault(element.tag, element)


def _stored_pixels(dataset: Any, path: Path) -> NDArray[Any]:
    """The decoded pixels before any rescaling, ``[H, W]``, or RGB or palette colour ``[H, W, 3]``."""
    from pydicom.pixels import apply_color_lut, pixel_array

    if not any(keyword in dataset for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise ImageError(f"{path}: holds no picture, or is truncated before it")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames != 1:
        raise ImageError(f"{path}: expected one frame, got {frames}")
    kind = str(dataset.get("PhotometricInterpretation"))
    if kind not in (*_MONOCHROME, *_COLOUR):
        raise ImageError(f"{path}: unsupported photometric interpretation {kind}")
    try:
        stored = pixel_array(dataset)
    except Exception as error:  # decoders raise whatever they like
        syntax = getattr(dataset.file_meta.get("TransferSyntaxUID"), "name", "unknown")
        reason = " ".join(str(error).split())
        raise ImageError(f"{path}: the pixels (transfer syntax {syntax}) cannot be decoded: {reason}") from error
    stored = stored.reshape(stored.shape[-2:] if kind not in _COLOUR or kind == "PALETTE COLOR" else stored.shape[-3:])
    return apply_color_lut(stored, dataset) if kind == "PALETTE COLOR" else stored


def _colour(dataset: Any, stored: NDArray[Any]) -> NDArray[np.uint8]:
    """The upper 8 bits of the samples, ``[H, W, 3]``."""
    palette = dataset.PhotometricInterpretation == "PALETTE COLOR"
    bits = stored.dtype.itemsize * 8 if palette else int(dataset.BitsStored)
    return np.ascontiguousarray((stored >> max(bits - 8, 0)).astype(np.uint8))


def _grey(dataset: Any, stored: NDArray[Any], inverted: bool) -> NDArray[np.float32]:
    """Stored values ``[H, W]`` -> values in the modality's units."""
    from pydicom.pixels import apply_modality_lut

    for keyword in ("RescaleSlope", "RescaleIntercept"):
        if keyword in dataset and dataset[keyword].is_empty:
            del dataset[keyword]
    values = apply_modality_lut(stored, dataset).astype(np.float64)
    padding = _padding(dataset, stored)
    if padding.any() and not padding.all():
        values[padding] = values[~padding].max() if inverted else values[~padding].min()
    return values.astype(np.float32)


def _padding(dataset: Any, stored: NDArray[Any]) -> NDArray[np.bool_]:
    value = _numbers(dataset, "PixelPaddingValue")
    if not value.size or stored.dtype.kind not in "iu":
        return np.zeros(stored.shape, dtype=np.bool_)
    ends = np.concatenate([value, _numbers(dataset, "PixelPaddingRangeLimit")])
    ends = ends.astype(np.int64).astype(stored.dtype)  # some files give a signed value as unsigned: this wraps it
    return (stored >= ends.min()) & (stored <= ends.max())


def _dicom_window(dataset: Any) -> Window | None:
    centre, width = _numbers(dataset, "WindowCenter"), _numbers(dataset, "WindowWidth")
    if not centre.size or not width.size or width[0] <= 0:
        return None
    return float(centre[0] - width[0] / 2), float(centre[0] + width[0] / 2)


def _numbers(dataset: Any, keyword: str, count: int | None = None) -> NDArray[np.float64]:
    """An element's values; none if it is missing, empty, not finite or has not `count` values."""
    value = dataset.get(keyword)
    values = np.atleast_1d(np.asarray([] if value is None or value == "" else value, dtype=np.float64))
    return values if np.isfinite(values).all() and count in (None, values.size) else np.empty(0)


def _dicom_geometry(dataset: Any, rows: int, columns: int) -> Geometry:
    """The picture as a volume ``[columns, rows, 1]``. DICOM PS3.3, C.7.6.2.1.1, and its LPS+ turned into RAS+."""
    keywords = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
    spacings = [_numbers(dataset, keyword, 2) for keyword in keywords]  # between rows, between columns
    spacing = next((found for found in spacings if found.size and (found > 0).all()), np.ones(2))
    depths = [_numbers(dataset, keyword, 1) for keyword in ("SliceThickness", "SpacingBetweenSlices")]
    depth = next((float(found[0]) for found in depths if found.size and found[0] > 0), 1.0)
    axes = _numbers(dataset, "ImageOrientationPatient", 6).reshape(-1, 3)
    if not axes.size or np.linalg.norm(np.cross(axes[0], axes[1])) < 0.5:
        axes = np.eye(3)[:2]
    affine = np.eye(4)
    affine[:3, 0] = axes[0] * spacing[1]
    affine[:3, 1] = axes[1] * spacing[0]
    affine[:3, 2] = np.cross(axes[0], axes[1]) * depth
    position = _numbers(dataset, "ImagePositionPatient", 3)
    affine[:3, 3] = position if position.size else 0
    affine[:2] *= -1
    return Geometry(affine, (columns, rows, 1), (slice(0, columns), slice(0, rows), slice(0, 1)), _IDENTITY)


def read_nifti(path: str | PathLike[str], index: int | None = None) -> Slice:
    """A slice of a NIfTI file, ``.nii`` or ``.nii.gz``, with one volume; scl_slope and scl_inter are applied.

    Slices are axial: they follow the axis that is closest to inferior-superior. A volume of a single slice along
    another axis is shown as it is cut: coronal with the head at the top and the patient's right at the left, sagittal
    with the head at the top and the front at the left.

    Args:
        index: counted from the patient's feet, in whichever order the file has the slices; by default the middle one.

    Raises:
        FileNotFoundError, PermissionError: as the system says, naming the file.
        ImageError: not NIfTI, damaged, several volumes, NaN or infinite values, no such slice, nibabel missing.
    """
    path = Path(path)
    with _decoding(path, "NIfTI"):
        image = _open_nifti(path)
        shape = _volume_shape(image.shape)
        axis = _slice_axis(image)
        if index is not None and not 0 <= index < shape[axis]:
            raise ImageError(f"{path}: expected a slice index from 0 to {shape[axis] - 1}, got {index}")
        index = shape[axis] // 2 if index is None else index
        orientation = _display_orientation(image, axis)
        start = index if orientation[axis, 1] > 0 else shape[axis] - 1 - index
        whole = [slice(0, length) for length in shape]
        place = (*whole[:axis], slice(start, start + 1), *whole[axis + 1 :])
        pixels = _nifti_pixels(image, place, orientation)
        if not np.isfinite(pixels).all():
            raise ImageError(f"{path}: slice {index} holds NaN or infinite values")
        geometry = Geometry(np.asarray(image.affine, np.float64), image.shape, place, orientation, image.header.copy())
        low, high = float(image.header["cal_min"]), float(image.header["cal_max"])
        window = (low, high) if np.isfinite([low, high]).all() and low < high else None
        modality = "CT" if _lowest_value(path, path.stat().st_mtime_ns) <= AIR else ""
        return Slice(pixels, window, geometry, modality)


@lru_cache(maxsize=16)
def _lowest_value(path: Path, changed: int) -> float:
    """Of a whole NIfTI file, last changed at this time: a slice of tissue alone is of CT where others hold air."""
    data = _open_nifti(path).dataobj
    stored = data.get_unscaled()
    ends = [float(find.reduce(stored, axis=None)) for find in (np.fmin, np.fmax)]
    return min(data.slope * end + data.inter for end in ends)


def _open_nifti(path: Path) -> Any:
    """The file as a nibabel image that is known to hold one volume of real numbers; its pixels are not read yet."""
    with _package("nibabel", path):
        import nibabel
        from nibabel.orientations import io_orientation
    try:
        image = nibabel.load(path)
    except nibabel.filebasedimages.ImageFileError as error:
        raise ImageError(f"{path}: not a NIfTI file") from error
    if not isinstance(image, nibabel.Nifti1Image):
        raise ImageError(f"{path}: expected a NIfTI file, got {type(image).__name__}")
    volumes = int(np.prod(image.shape[3:]))
    if volumes > 1:
        raise ImageError(f"{path}: expected one volume, got {volumes}")
    if len(image.shape) < 2 or 0 in image.shape:
        raise ImageError(f"{path}: expected a picture or a volume, got shape {image.shape}")
    if image.get_data_dtype().kind not in "iuf":
        raise ImageError(f"{path}: expected integer or floating-point values, got {image.get_data_dtype()}")
    if np.isnan(io_orientation(image.affine)).any():
        raise ImageError(f"{path}: its affine is singular")
    return image


def _volume_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The first three lengths; a picture is a volume of one slice."""
    return shape[0], shape[1], shape[2] if len(shape) > 2 else 1


def _slice_axis(image: Any) -> int:
    """The only axis of length 1, else the one closest to inferior-superior."""
    from nibabel.orientations import io_orientation

    flat = [axis for axis, length in enumerate(_volume_shape(image.shape)) if length == 1]
    return flat[0] if len(flat) == 1 else int(np.argmax(io_orientation(image.affine)[:, 0]))


def _display_orientation(image: Any, axis: int) -> NDArray[Any]:
    """The orientation ``[3, 2]`` that brings the volume to columns, rows, slices as shown."""
    from nibabel import orientations

    stored = orientations.io_orientation(image.affine)
    shown = orientations.axcodes2ornt(_DISPLAY[int(stored[axis, 0])])
    return np.asarray(orientations.ornt_transform(stored, shown))


def _nifti_pixels(image: Any, place: tuple[slice, ...], orientation: NDArray[Any]) -> NDArray[np.float32]:
    """Reads only this slice from the file -> ``[H, W]`` as shown."""
    from nibabel.orientations import apply_orientation

    axes = len(image.shape)
    stored = np.asarray(image.dataobj[place[:axes] + (0,) * (axes - 3)])
    volume = stored.reshape([part.stop - part.start for part in place])
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
        return np.ascontiguousarray(apply_orientation(volume, orientation)[:, :, 0].T.astype(np.float32))


def apply_window(pixels: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """Values of any shape -> 0 (`low` and below) to 255 (`high` and above), linear between and rounded.

    Raises:
        ValueError: `low` is not below `high`, or they are not finite.
    """
    if not low < high or not np.isfinite([low, high]).all():
        raise ValueError(f"window: expected low < high, got {low:g} and {high:g}")
    values = np.clip(pixels.astype(np.float64), low, high)
    return np.rint((values - low) / (high - low) * 255).astype(np.uint8)


def default_window(slice: Slice) -> Window:
    """The file's own window; for CT without one -512 to 512 HU; 0 to 255 for colour; else the 0.5 and 99.5 percentiles.

    Where the percentiles are equal, the minimum and maximum are taken; a constant picture will be all black.
    """
    if slice.window is not None:
        return slice.window
    if slice.pixels.ndim == 3:
        return 0.0, 255.0
    if slice.modality == "CT":
        return CT_WINDOW
    low, high = np.percentile(slice.pixels, [0.5, 99.5])
    if low >= high:
        low, high = slice.pixels.min(), slice.pixels.max()
    return float(low), float(high) if high > low else float(np.nextafter(low, np.inf, dtype=np.float32))


def write_nifti(path: str | PathLike[str], parts: Sequence[tuple[NDArray[Any], Slice]]) -> None:
    """Writes labels as a NIfTI file, ``.nii`` or ``.nii.gz``, whose voxels lie exactly on those of the input.

    A label map of a DICOM picture becomes a volume ``[columns, rows, 1]``; those of slices of a NIfTI file one volume
    of the input's shape that is 0 outside them. The type is the smallest unsigned one that holds the labels.

    Args:
        parts: at least one slice of one file, each with its labels: integers >= 0, ``[H, W]`` as the slice is shown.

    Raises:
        ValueError: unsuitable labels, a slice without geometry, or another suffix.
        ImageError: nibabel missing.
        OutputError: the file cannot be written.
    """
    path = Path(path)
    placed = [(labels, _checked_geometry(labels, slice)) for labels, slice in parts]
    if not is_volume(path):
        raise ValueError(f"path: expected a name ending in .nii or .nii.gz, got {path}")
    with _package("nibabel", path):
        from nibabel import orientations

    whole = placed[0][1]
    largest = max(int(labels.max()) for labels, _ in placed)
    volume = np.zeros(_volume_shape(whole.shape), dtype=np.min_scalar_type(largest))
    for labels, geometry in placed:
        undo = orientations.ornt_transform(_IDENTITY, geometry.orientation)
        volume[geometry.place] = orientations.apply_orientation(labels.T[:, :, None], undo)
    content = _nifti_bytes(volume.reshape(whole.shape), whole)
    with complete_file(path) as temporary:
        temporary.write_bytes(gzip.compress(content, mtime=0) if path.name.lower().endswith(".gz") else content)


def _checked_geometry(labels: NDArray[Any], slice: Slice) -> Geometry:
    if slice.geometry is None:
        raise ValueError("slice: has no geometry to write labels with")
    if labels.shape != slice.pixels.shape[:2]:
        raise ValueError(f"labels: expected shape {slice.pixels.shape[:2]}, got {labels.shape}")
    if labels.dtype.kind not in "biu" or labels.min() < 0:
        raise ValueError(f"labels: expected integers >= 0, got {labels.dtype} from {labels.min()}")
    return slice.geometry


def _nifti_bytes(volume: NDArray[Any], geometry: Geometry) -> bytes:
    """An uncompressed NIfTI file; of the input's header only what says where the voxels lie."""
    import nibabel

    if geometry.header is None:
        image = nibabel.Nifti1Image(volume, geometry.affine, dtype=volume.dtype)
        image.set_sform(geometry.affine, code="scanner")
        image.set_qform(geometry.affine, code="scanner")
        image.header.set_xyzt_units("mm")
        return bytes(image.to_bytes())
    header = type(geometry.header)()
    for field in _GEOMETRY_FIELDS:
        header[field] = geometry.header[field]
    kind = nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image
    return bytes(kind(volume, geometry.affine, header, dtype=volume.dtype).to_bytes())
