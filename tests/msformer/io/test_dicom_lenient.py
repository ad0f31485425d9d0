"""DICOM files that are not as the standard has them, of which the pixels are good."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray

from msformer.io.base import ImageError
from msformer.io.dicom import is_dicom, read_dicom
from msformer.io.medical import is_medical, read_slice
from tests.msformer.io.world import COLOUR, GREY, UID, save_dicom

SPACED = GREY * 50


def without(path: Path, start: int) -> Path:
    path.write_bytes(path.read_bytes()[start:])
    return path


def bare(path: Path, implicit: bool, little: bool, preamble: bool = False) -> Path:
    """Without file meta information."""
    pixels = SPACED.astype("<i2" if little else ">i2")
    dataset = pydicom.dcmread(save_dicom(path, SPACED))
    dataset.PixelData = pixels.tobytes()
    plain = pydicom.Dataset(dataset)
    plain.save_as(path, implicit_vr=implicit, little_endian=little)
    if preamble:
        path.write_bytes(bytes(128) + path.read_bytes())
    return path


@pytest.mark.parametrize("preamble", [False, True])
@pytest.mark.parametrize(("implicit", "little"), [(True, True), (False, True), (False, False)])
def test_without_file_meta_information(implicit: bool, little: bool, preamble: bool, tmp_path: Path) -> None:
    path = bare(tmp_path / "no suffix", implicit, little, preamble)
    assert is_dicom(path)
    with pytest.warns(UserWarning, match="TransferSyntaxUID: the file says nothing; its pixels are read as"):
        assert np.array_equal(read_slice(path).pixels, SPACED)


@pytest.mark.parametrize("start", [128, 132])
def test_without_preamble(start: int, tmp_path: Path) -> None:
    """With the letters DICM, and without them."""
    path = without(save_dicom(tmp_path / "no suffix", SPACED), start)
    assert is_medical(path)
    found = read_slice(path)
    assert np.array_equal(found.pixels, SPACED)
    assert "the file has no preamble" in found.notes


def test_without_the_letters_after_the_preamble(tmp_path: Path) -> None:
    path = save_dicom(tmp_path / "a", SPACED)
    path.write_bytes(path.read_bytes().replace(b"DICM", b"\0\0\0\0", 1))
    assert np.array_equal(read_slice(path).pixels, SPACED)


def test_compressed_as_a_whole(tmp_path: Path) -> None:
    path = save_dicom(tmp_path / "a.dcm.gz", SPACED)
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert is_medical(path)
    assert np.array_equal(read_slice(path).pixels, SPACED)
    (tmp_path / "b").write_bytes(b"\x1f\x8b" + bytes(20))
    assert not is_dicom(tmp_path / "b")


@pytest.mark.parametrize(
    "content",
    [b"", b"\x08\x00\x05\x00", b"\x08\x00\x05\x00CS\x0a\x00", b"\x02\x00" * 500, b"BM" + bytes(500), bytes(999)],
)
def test_what_is_not_dicom(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    assert not is_dicom(tmp_path / "a")


def put(path: Path, keyword: str, vr: str, value: bytes) -> Path:
    """Writes an element of a file with explicit VR as these bytes, in place of what it had or in order."""
    tag = pydicom.tag.Tag(pydicom.datadict.tag_for_keyword(keyword))
    dataset = pydicom.dcmread(path)
    dataset[tag] = pydicom.dataelem.RawDataElement(tag, "UN", len(value), b"\xee" * len(value), 0, False, True)
    dataset.save_as(path)
    content = path.read_bytes()
    head = struct.pack("<HH", tag.group, tag.element)
    old = head + b"UN\0\0" + struct.pack("<I", len(value)) + b"\xee" * len(value)
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, head + vr.encode() + struct.pack("<H", len(value)) + value))
    return path


@pytest.mark.parametrize(
    ("keyword", "vr", "value", "warning"),
    [
        ("SliceThickness", "DS", b"5,00", "SliceThickness: '5,00' is read as 5"),
        ("SliceThickness", "DS", b" 5.0 ", None),
        ("SliceThickness", "LO", b"5.00", None),
        ("SliceThickness", "FD", struct.pack("<d", 5), None),
        ("SliceThickness", "DS", b"5 mm", "SliceThickness: expected numbers, got '5 mm'; it is left out"),
        ("SliceThickness", "DS", b"1.5.2 ", "SliceThickness: expected numbers, got '1.5.2 '"),
        ("PatientWeight", "DS", b"71,5", None),
        ("Rows", "IS", b"4 ", None),
        ("Rows", "UL", struct.pack("<I", 4), None),
        ("BitsAllocated", "DS", b"16", None),
        ("NumberOfFrames", "IS", b"1A", "NumberOfFrames: expected numbers, got '1A'; it is left out"),
        ("NumberOfFrames", "US", struct.pack("<H", 1), None),
        ("WindowCenter", "DS", b"wide", "WindowCenter: expected numbers, got 'wide'; it is left out"),
        ("PixelPaddingValue", "DS", b"9999", None),
        ("ImagePositionPatient", "DS", b"1\\2 ", "ImagePositionPatient: expected 3 numbers, got '1"),
        ("PhotometricInterpretation", "LO", b"monochrome2 ", None),
        ("PatientBirthDate", "DA", b"yesterday ", None),
    ],
)
def test_elements_that_are_written_wrongly(
    keyword: str, vr: str, value: bytes, warning: str | None, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = put(save_dicom(tmp_path / "a.dcm", SPACED), keyword, vr, value)
    found = read_slice(path)
    assert np.array_equal(found.pixels, SPACED)
    said = [note for note in found.notes if keyword in note]
    assert bool(said) == (warning is not None)
    if warning is not None:
        assert any(warning.split("'")[0] in str(each.message) for each in recwarn)
    if keyword == "SliceThickness" and b"mm" not in value and b".2" not in value:
        assert found.geometry is not None
        assert found.geometry.affine[2, 2] == 5


PLACES = {
    "1,5": 1.5,
    "1.234,5": 1234.5,
    "1,024.5": 1024.5,
    "-2,5E1": -25.0,
    " +3 ": 3.0,
    "2\0": 2.0,
    "1,2,3": None,
}


@pytest.mark.parametrize(("text", "value"), PLACES.items())
def test_numbers_of_other_places(text: str, value: float | None, tmp_path: Path) -> None:
    content = text.encode() + b" " * (len(text) % 2)
    path = put(save_dicom(tmp_path / "a.dcm", GREY, RescaleSlope=1), "RescaleIntercept", "DS", content)
    assert read_slice(path).pixels[0, 0] == (0 if value is None else value)


@pytest.mark.parametrize(
    ("missing", "pixels", "photometric"),
    [
        ("BitsStored", SPACED, "MONOCHROME2"),
        ("HighBit", SPACED, "MONOCHROME2"),
        ("BitsAllocated", SPACED, "MONOCHROME2"),
        ("BitsAllocated", GREY.astype(np.uint8), "MONOCHROME2"),
        ("SamplesPerPixel", SPACED, "MONOCHROME2"),
        ("SamplesPerPixel", COLOUR, "RGB"),
        ("PhotometricInterpretation", SPACED, "MONOCHROME2"),
        ("PhotometricInterpretation", COLOUR, "RGB"),
        ("PlanarConfiguration", COLOUR, "RGB"),
        ("PixelRepresentation", SPACED, "MONOCHROME2"),
    ],
)
def test_elements_that_are_missing(missing: str, pixels: NDArray[Any], photometric: str, tmp_path: Path) -> None:
    path = save_dicom(tmp_path / "a.dcm", pixels, photometric)
    dataset = pydicom.dcmread(path)
    del dataset[missing]
    dataset.save_as(path)
    with pytest.warns(UserWarning, match=missing):
        found = read_slice(path)
    assert np.array_equal(found.pixels, pixels)


def test_a_character_set_that_does_not_exist(tmp_path: Path) -> None:
    path = save_dicom(tmp_path / "a.dcm", SPACED, SpecificCharacterSet="ISO_IR 100", PatientName="Ü")
    path.write_bytes(path.read_bytes().replace(b"ISO_IR 100", b"KLINGON 66"))
    assert np.array_equal(read_slice(path).pixels, SPACED)


def test_without_a_size(tmp_path: Path) -> None:
    path = save_dicom(tmp_path / "a.dcm", SPACED)
    dataset = pydicom.dcmread(path)
    del dataset.Rows
    dataset.save_as(path)
    with pytest.raises(ImageError, match=r"a\.dcm: expected a picture with rows and columns, got 0 x 5"):
        read_slice(path)


def test_values_in_the_other_bits(tmp_path: Path) -> None:
    """Overlays lie above the highest bit; and values need not begin at bit 0."""
    for high, shift in ((11, 0), (15, 4)):
        stored = (SPACED.astype(np.uint16) << shift) | (0xF000 if shift == 0 else 0x000F)
        path = save_dicom(tmp_path / f"{high}.dcm", stored, BitsStored=12, HighBit=high)
        assert np.array_equal(read_slice(path).pixels, SPACED)
    signed = ((GREY - 10) & 0xFFF).astype(np.uint16)
    path = save_dicom(tmp_path / "signed.dcm", signed, BitsStored=12, HighBit=11, PixelRepresentation=1)
    assert np.array_equal(read_slice(path).pixels, GREY - 10)


SMOOTH = (np.add.outer(np.arange(24), np.arange(32)) * 70).astype(np.uint16)


@pytest.mark.parametrize("syntax", [UID.JPEGExtended12Bit, UID.JPEGBaseline8Bit, UID.JPEG2000Lossless])
def test_jpeg_of_12_bits(syntax: str, tmp_path: Path) -> None:
    """Processes 2 and 4; also where the transfer syntax is another than that of the stream."""
    stream = imagecodecs.jpeg8_encode(SMOOTH, level=100, bitspersample=12)
    data = pydicom.encaps.encapsulate([stream])
    tags = {"BitsStored": 12, "HighBit": 11, "RescaleSlope": 1, "RescaleIntercept": -1024}
    found = read_dicom(save_dicom(tmp_path / "a.dcm", SMOOTH, syntax=syntax, PixelData=data, **tags))
    assert np.abs(found.pixels - (SMOOTH - 1024.0)).max() <= 8
    assert np.abs(found.pixels - (SMOOTH - 1024.0)).mean() <= 2


@pytest.mark.parametrize(
    ("encode", "said"),
    [
        (lambda pixels: imagecodecs.ljpeg_encode(pixels, bitspersample=16), UID.JPEG2000Lossless),
        (imagecodecs.jpegls_encode, UID.JPEGLosslessSV1),
        (imagecodecs.jpegls_encode, UID.ExplicitVRLittleEndian),
        (lambda pixels: imagecodecs.jpeg2k_encode(pixels, codecformat="j2k", reversible=True), UID.RLELossless),
        (lambda pixels: imagecodecs.jpeg2k_encode(pixels, codecformat="j2k", reversible=True), UID.HTJ2KLossless),
        (lambda pixels: imagecodecs.jpegxl_encode(pixels, lossless=True), "1.2.840.10008.1.2.4.110"),
    ],
    ids=["jpeg-lossless", "jpeg-ls", "jpeg-ls-native", "jpeg-2000", "htj2k", "jpeg-xl"],
)
def test_streams_of_another_kind_than_is_said(encode: Callable[[Any], bytes], said: str, tmp_path: Path) -> None:
    path = save_dicom(
        tmp_path / "a.dcm", SMOOTH, syntax=UID.JPEG2000Lossless, PixelData=pydicom.encaps.encapsulate([encode(SMOOTH)])
    )
    content = path.read_bytes()
    old, new = (uid.encode() + b"\0" * (len(uid) % 2) for uid in (UID.JPEG2000Lossless, said))
    start = content.index(old)
    header = content[start - 8 : start - 2] + struct.pack("<H", len(new))
    path.write_bytes(content[: start - 8] + header + new + content[start + len(old) :])
    assert np.array_equal(read_slice(path).pixels, SMOOTH)


@pytest.mark.parametrize("kind", ["YBR_PARTIAL_422", "YBR_FULL_422", "YBR_FULL"])
def test_native_ycbcr(kind: str, tmp_path: Path) -> None:
    """PS3.3, C.7.6.3.1.2: one colour, in the full range or in that of video."""
    red, green, blue = 200, 100, 50
    if kind == "YBR_PARTIAL_422":
        y = 0.2568 * red + 0.5041 * green + 0.0979 * blue + 16
        cb = -0.1482 * red - 0.2910 * green + 0.4392 * blue + 128
        cr = 0.4392 * red - 0.3678 * green - 0.0714 * blue + 128
    else:
        y = 0.2990 * red + 0.5870 * green + 0.1140 * blue
        cb = -0.1687 * red - 0.3313 * green + 0.5000 * blue + 128
        cr = 0.5000 * red - 0.4187 * green - 0.0813 * blue + 128
    samples = [round(value) for value in (y, cb, cr)]
    pixels = np.full((4, 6, 3), samples, np.uint8)
    data = bytes([samples[0], samples[0], *samples[1:]] * 12) if "422" in kind else pixels.tobytes()
    found = read_dicom(save_dicom(tmp_path / "a.dcm", pixels, kind, PixelData=data)).pixels
    assert np.abs(found.astype(int) - [red, green, blue]).max() <= 2


def test_a_damaged_sequence_before_the_pixels(tmp_path: Path) -> None:
    """Its length reaches beyond the end of the file."""
    tags = {"RescaleSlope": 2, "RescaleIntercept": -5, "WindowCenter": 40, "WindowWidth": 9, "Modality": "CT"}
    path = save_dicom(tmp_path / "a.dcm", SPACED, **tags)
    content = path.read_bytes()
    place = content.index(struct.pack("<HH", 0x0028, 0x0002))
    broken = struct.pack("<HH", 0x0021, 0x1001) + b"SQ\0\0" + struct.pack("<I", 1 << 20) + b"\xfe\xff\x00\xe0junk"
    path.write_bytes(content[:place] + broken + content[place:])
    with pytest.warns(UserWarning, match=r"the file is damaged .* were found by their tags"):
        found = read_slice(path)
    assert np.array_equal(found.pixels, SPACED * 2.0 - 5)
    assert (found.modality, found.window) == ("CT", (35.5, 43.5))


def test_a_beginning_that_is_damaged(tmp_path: Path) -> None:
    path = save_dicom(tmp_path / "a.dcm", SPACED)
    path.write_bytes(b" " + path.read_bytes()[150:])
    with pytest.warns(UserWarning, match="it does not begin as DICOM files do"):
        assert np.array_equal(read_slice(path).pixels, SPACED)


def test_bytes_in_a_stream_that_look_like_its_end(tmp_path: Path) -> None:
    stream = imagecodecs.jpegls_encode(SMOOTH)
    stream += b"\xfe\xff\xdd\xe0" + bytes(10)
    path = save_dicom(
        tmp_path / "a.dcm", SMOOTH, syntax=UID.JPEGLSLossless, PixelData=pydicom.encaps.encapsulate([stream])
    )
    assert np.array_equal(read_slice(path).pixels, SMOOTH)


def test_doses(tmp_path: Path) -> None:
    path = save_dicom(tmp_path / "a.dcm", GREY.astype(np.uint32), Modality="RTDOSE", DoseGridScaling=0.25)
    assert np.array_equal(read_slice(path).pixels, GREY / 4)


def test_bits(tmp_path: Path) -> None:
    """One bit a pixel, the lowest first."""
    pixels = np.array([[0, 1, 1, 0, 0, 0, 0, 1]], np.uint8)
    path = save_dicom(tmp_path / "a.dcm", pixels, BitsAllocated=1, BitsStored=1, HighBit=0, PixelData=b"\x86\0")
    assert np.array_equal(read_slice(path).pixels, pixels)
