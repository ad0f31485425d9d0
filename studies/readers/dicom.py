"""DICOM: values beside SimpleITK's (GDCM) and pydicom's, and pictures beside pydicom's windows and look-up tables."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msformer.io.base import Slice, show
from msformer.io.dicom import count_frames, read_dicom
from studies.readers.compare import Source, optional, shipped

_OTHERS = r"^(?!.*\.(py|pyc|json|md|txt|dump|icc|bin|bz2)$)(?!README)"


def files() -> Iterator[Path]:
    """What pydicom and nibabel ship."""
    yield from shipped("pydicom", "data", _OTHERS)
    for folder in ("nicom/tests/data", "tests/data"):
        yield from shipped("nibabel", folder, r"\.dcm(\.gz)?$")


def pictures(path: Path) -> int:
    read_dicom(path)
    return count_frames(path)


def is_empty(path: Path) -> bool:
    """Whether pydicom finds no pixels."""
    return not any(keyword in _dataset(path) for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData"))


@lru_cache(maxsize=4)
def _slice(path: Path, index: int) -> Slice:
    return read_dicom(path, index)


def our_values(path: Path, index: int) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """In the modality's units, or RGB; of what is not background."""
    found = _slice(path, index)
    return found.pixels, None if found.background is None else ~found.background


def our_picture(path: Path, index: int) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """As shown, before any inversion."""
    found = _slice(path, index)
    shown = show(found)
    return 255 - shown if found.inverted else shown, our_values(path, index)[1]


@lru_cache(maxsize=2)
def _with_simpleitk(path: Path) -> Any:
    sitk = optional("SimpleITK")
    if sitk is None:
        raise NotImplementedError("SimpleITK is not installed")
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    with NamedTemporaryFile(suffix=".dcm") as plain:
        plain.write(_uncompressed(path))
        plain.flush()
        reader.SetFileName(plain.name)
        return sitk.GetArrayFromImage(reader.Execute())


def _uncompressed(path: Path) -> bytes:
    content = path.read_bytes()
    return gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content


def simpleitk_values(path: Path, index: int) -> NDArray[Any] | None:
    pixels = _with_simpleitk(path)
    ours = _slice(path, index).pixels
    if ours.ndim == 3 and pixels.ndim == 3 and pixels.shape[-1] != 3:
        return None
    frames = pixels if pixels.ndim == ours.ndim + 1 else pixels[None]
    frame = frames[index]
    return _eight_bits(frame, path) if ours.ndim == 3 else _as_the_standard_has_it(frame, path)


def _as_the_standard_has_it(values: NDArray[Any], path: Path) -> NDArray[np.float32]:
    """SimpleITK makes MONOCHROME1 of MONOCHROME2, white of bits, and leaves doses as they are stored."""
    dataset, values = _dataset(path), values.astype(np.float64)
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
        values = slope * (2**dataset.BitsStored - 1) + 2 * intercept - values
    if dataset.BitsAllocated == 1:
        values /= 255
    return np.asarray(values * float(dataset.get("DoseGridScaling", 1)), np.float32)


def _eight_bits(pixels: NDArray[Any], path: Path) -> NDArray[Any]:
    """The upper 8 bits of colours."""
    if pixels.dtype.itemsize == 1:
        return pixels
    dataset = _dataset(path)
    palette = dataset.PhotometricInterpretation == "PALETTE COLOR"
    return np.asarray(pixels >> (pixels.dtype.itemsize * 8 if palette else dataset.BitsStored) - 8, np.uint8)


@lru_cache(maxsize=2)
def _dataset(path: Path) -> Any:
    import pydicom

    dataset = pydicom.dcmread(BytesIO(_uncompressed(path)), force=True)
    if "TransferSyntaxUID" not in dataset.file_meta and dataset.original_encoding[0] is not None:
        implicit, little = dataset.original_encoding
        uid = pydicom.uid
        native = uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian
        dataset.file_meta.TransferSyntaxUID = native if little else uid.ExplicitVRBigEndian
    return dataset


@lru_cache(maxsize=2)
def _with_pydicom(path: Path, index: int) -> Any:
    from pydicom.pixels import pixel_array

    return pixel_array(_dataset(path), index=index)


def pydicom_values(path: Path, index: int) -> NDArray[Any] | None:
    from pydicom.pixels import apply_color_lut, apply_modality_lut

    dataset, pixels = _dataset(path), _with_pydicom(path, index)
    if "SharedFunctionalGroupsSequence" in dataset:
        return None
    if pixels.ndim == 3:
        return _eight_bits(pixels, path)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        return _eight_bits(apply_color_lut(pixels, dataset), path)
    dose = float(dataset.get("DoseGridScaling", 1))
    return np.asarray(apply_modality_lut(pixels, dataset) * dose, np.float32)


def pydicom_picture(path: Path, index: int) -> NDArray[Any] | None:
    """Its values of interest, whose range is that of its stored values after rescaling, in 8 bits."""
    from pydicom.pixels import apply_modality_lut, apply_voi_lut, apply_windowing

    dataset, pixels = _dataset(path), _with_pydicom(path, index)
    if pixels.ndim == 3 or not ("WindowCenter" in dataset or "VOILUTSequence" in dataset):
        return None
    values = apply_modality_lut(pixels, dataset)
    if "VOILUTSequence" in dataset:
        bits = dataset.VOILUTSequence[0].LUTDescriptor[2]
        return np.rint(apply_voi_lut(values, dataset) / (2.0**bits - 1) * 255)
    ends = apply_windowing(np.array([-1e9, 1e9]), dataset)
    return np.rint((apply_windowing(values, dataset) - ends[0]) / (ends[1] - ends[0]) * 255)


SOURCE = Source(
    "DICOM of pydicom and nibabel",
    files,
    pictures,
    {"values": our_values, "picture": our_picture},
    {
        "SimpleITK": ("values", simpleitk_values),
        "pydicom": ("values", pydicom_values),
        "pydicom's window": ("picture", pydicom_picture),
    },
    {"picture": 1},
    is_empty,
    {
        ("SimpleITK", r"^SC_rgb_rle_(16|32)bit"): "GDCM mixes the bytes of RLE coded colours of 16 and 32 bits",
        ("SimpleITK", r"^rtdose_expb\.dcm"): "GDCM mixes the bytes of big-endian values of 32 bits",
        ("SimpleITK", r"^JPGExtended|^JPEG-lossy"): "lossy JPEG: decoders may round differently, by 1 of 4095",
    },
)
