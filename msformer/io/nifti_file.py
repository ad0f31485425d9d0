"""Opening NIfTI files as they come: compressed or not, whatever their name says, and with headers that are wrong where
it does not matter for the voxels."""

from __future__ import annotations

import gzip
import logging
import struct
import zlib
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msformer.io.base import ImageError, Notes, needs_package

SUFFIXES_NIFTI = (".nii", ".nii.gz")

_GZIP = b"\x1f\x8b"
_RATIO = 1100
"""More than gzip compresses anything by."""
_SIZES = (348, 540)
_MAGICS = ((1, 344, (b"n+1\0", b"ni1\0")), (2, 4, (b"n+2\0", b"ni2\0")))
"""By version: where the magic string is, of a single file and of a header whose voxels are in another."""
_CONNECTIVITY = range(3000, 3100)
"""Intent codes of CIFTI."""
_COLOURS = (np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]), np.dtype([(name, "u1") for name in "RGBA"]))


def is_volume(path: str | PathLike[str]) -> bool:
    """Whether the path has a suffix of NIfTI, or is a NIfTI file by its content."""
    return Path(path).name.lower().endswith(SUFFIXES_NIFTI) or _version(Path(path)) is not None


def _version(path: Path) -> int | None:
    """1 or 2 by the content of a NIfTI file, compressed or not, or with a suffix of NIfTI by the size of its header
    alone; None for any other file, or what cannot be opened."""
    try:
        if not path.is_file():
            return None
        with _opened(path) as file:
            head = file.read(_SIZES[0])
    except (OSError, EOFError, zlib.error):
        return None
    found = next((version for version, place, magics in _MAGICS if head[place : place + 4] in magics), None)
    if found is None and len(head) == _SIZES[0] and path.name.lower().endswith(SUFFIXES_NIFTI):
        sizes = {struct.unpack(f"{order}i", head[:4])[0] for order in "<>"}
        found = next((version for version, size in enumerate(_SIZES, 1) if size in sizes), None)
    return found


def _opened(path: Path) -> Any:
    """The file, uncompressed as it is read."""
    file = path.open("rb")
    compressed = file.read(2) == _GZIP
    file.seek(0)
    return gzip.open(file) if compressed else file


@dataclass(eq=False)
class NiftiFile:
    """A NIfTI file whose voxels are not read yet.

    Attributes:
        header: with what was wrong in it put right.
        shape: as stored, 2 or more axes; those after the third count volumes.
        affine: float64 [4, 4], from voxel indexes to RAS+ positions in mm.
    """

    path: Path
    header: Any
    shape: tuple[int, ...]
    affine: NDArray[np.float64]
    notes: Notes

    @property
    def volume_shape(self) -> tuple[int, int, int]:
        """The first three lengths; a picture is a volume of one slice."""
        return self.shape[0], self.shape[1], self.shape[2] if len(self.shape) > 2 else 1

    @property
    def volumes(self) -> int:
        """How many volumes there are, one after the other."""
        return int(np.prod(self.shape[3:]))

    @cached_property
    def slice_axis(self) -> int:
        """The only axis of length 1, else the one closest to inferior-superior."""
        from nibabel.orientations import io_orientation

        flat = [axis for axis, length in enumerate(self.volume_shape) if length == 1]
        return flat[0] if len(flat) == 1 else int(np.argmax(io_orientation(self.affine)[:, 0]))

    def read(self, place: tuple[slice, ...] | None = None) -> NDArray[Any]:
        """Scaled values of a place in the axes as stored, or of the whole file; ``[..., 3]`` uint8 for colours."""
        from nibabel.arrayproxy import ArrayProxy

        parts = self.shape if place is None else [part.stop - part.start for part in place]
        wanted = int(np.prod(parts)) * self.header.get_data_dtype().itemsize
        with _opened(self.path) as file:
            most = self.path.stat().st_size * (_RATIO if isinstance(file, gzip.GzipFile) else 1)
            if wanted > most:
                raise ImageError(f"{self.path}: damaged: expected {wanted} bytes of voxels, got at most {most}")
            proxy = ArrayProxy(file, self.header, mmap=False)
            stored = np.asarray(proxy if place is None else proxy[place[: len(self.shape)]])
        if stored.dtype.names is None:
            return stored
        return np.stack([stored[name] for name in "RGB"], axis=-1)


def open_nifti(path: Path) -> NiftiFile:
    """Reads the header.

    Raises:
        ImageError: not NIfTI, values that are no real numbers or colours, or nibabel missing.
    """
    with needs_package(path):
        import nibabel
        from nibabel.arrayproxy import ArrayProxy  # noqa: F401
    version, notes = _version(path), Notes(path)
    if version is None:
        raise ImageError(f"{path}: not a NIfTI file")
    kind = nibabel.Nifti1Header if version == 1 else nibabel.Nifti2Header
    with _opened(path) as file:
        header = kind(file.read(kind.template_dtype.itemsize), check=False)
    if header["magic"].item() == header.pair_magic:
        raise ImageError(f"{path}: its voxels are in another file (.img); expected a single file, .nii")
    if int(header["intent_code"]) in _CONNECTIVITY:
        raise ImageError(f"{path}: expected a picture or a volume, got connectivity (CIFTI)")
    _repair(header, notes)
    shape = tuple(int(length) for length in header.get_data_shape())
    if len(shape) < 2 or min(shape) < 1:
        raise ImageError(f"{path}: expected a picture or a volume, got shape {shape}")
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf" and dtype not in _COLOURS:
        raise ImageError(f"{path}: expected integers, floating-point values or colours, got {dtype}")
    return NiftiFile(path, header, shape, _affine(header, notes), notes)


def _repair(header: Any, notes: Notes) -> None:
    """Puts right what nibabel knows to put right, and what it stops at."""
    silent = logging.Logger("msformer.nifti")
    silent.addHandler(logging.NullHandler())
    before = header.copy()
    header.check_fix(logger=silent, error_level=1000)
    changed = [name for name in header if not np.array_equal(_plain(before[name]), _plain(header[name]))]
    if changed:
        notes.warn(f"the header is wrong and was put right in {', '.join(changed)}")
    if header["vox_offset"] < header.single_vox_offset:
        header["vox_offset"] = header.single_vox_offset
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if np.isfinite(slope) and slope != 0 and not np.isfinite(inter):
        notes.warn(f"scl_inter: expected a number, got {inter}; 0 is assumed")
        header["scl_inter"] = 0
    elif not np.isfinite(slope) and not (np.isnan(slope) and np.isnan(inter)):
        notes.warn(f"scl_slope: expected a number, got {slope}; values are taken as stored")


def _plain(value: Any) -> NDArray[Any]:
    array = np.asarray(value)
    return np.nan_to_num(array) if array.dtype.kind == "f" else array


def _affine(header: Any, notes: Notes) -> NDArray[np.float64]:
    """The sform if there is one that can be used, else the qform, else what the voxel sizes say.

    An unusable form is taken out of the header.
    """
    found: dict[str, NDArray[np.float64]] = {}
    for name, read in (("sform", header.get_sform), ("qform", header.get_qform)):
        if header[f"{name}_code"] == 0:
            continue
        affine = _usable(read)
        if affine is None:
            notes.warn(f"the {name} is unusable and left out")
            header[f"{name}_code"] = 0
        else:
            found[name] = affine
    if len(found) == 2:
        _compare(found["sform"], found["qform"], header, notes)
    if found:
        return next(iter(found.values()))
    affine = _usable(header.get_base_affine)
    if affine is None:
        sizes = np.abs(_plain(header["pixdim"][1:4]).astype(np.float64))
        notes.warn(f"pixdim: expected three sizes of voxels, got {header['pixdim'][1:4]}; 1 mm is assumed for 0")
        header["pixdim"][1:4] = np.where(sizes > 0, sizes, 1)
        affine = np.asarray(header.get_base_affine(), np.float64)
    notes.assume("the file does not say how the patient lies; its axes are taken for left, front and head")
    return affine


def _usable(read: Any) -> NDArray[np.float64] | None:
    from nibabel.orientations import io_orientation

    try:
        affine = np.asarray(read(), np.float64)
        usable = bool(np.isfinite(affine).all()) and not np.isnan(io_orientation(affine)).any()
    except Exception:  # whatever is raised on forms that are none
        return None
    return affine if usable and abs(np.linalg.det(affine[:3, :3])) > 0 else None


def _compare(sform: NDArray[Any], qform: NDArray[Any], header: Any, notes: Notes) -> None:
    """Says where two forms put a corner of the volume apart by more than half of a voxel."""
    shape = np.array([*header.get_data_shape()[:3], 1, 1])[:3] - 1
    corners = np.array([[x, y, z, 1] for x in (0, shape[0]) for y in (0, shape[1]) for z in (0, shape[2])])
    apart = float(np.linalg.norm((corners @ (sform - qform).T)[:, :3], axis=1).max())
    size = float(np.linalg.norm(sform[:3, :3], axis=0).min())
    if apart <= size / 2:
        return
    from nibabel.orientations import aff2axcodes

    orders = ["".join(aff2axcodes(form)) for form in (sform, qform)]
    sentence = f"sform and qform put voxels up to {apart:.3g} mm apart; the sform is taken"
    if orders[0] != orders[1]:
        notes.warn(f"{sentence}, with voxels in the order {orders[0]}, not {orders[1]}")
    else:
        notes.assume(sentence)
