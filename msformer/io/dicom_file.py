"""Opening DICOM files as they come: without preamble, without file meta information, compressed as a whole, or damaged
where it does not matter for the picture."""

from __future__ import annotations

import gzip
import io
import struct
import threading
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from msformer.io.base import ImageError, Notes
from msformer.io.dicom_recovery import count_items, items_by_length, recover
from msformer.io.dicom_streams import has_items
from msformer.io.dicom_values import Values, of_frame

PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")

SUFFIXES_DICOM = (".dcm", ".dicom")

_GZIP = b"\x1f\x8b"
_HEAD = 1024
_LONG = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
_SHORT = (
    *(b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN"),
    *(b"SH", b"SL", b"SS", b"ST", b"TM", b"UI", b"UL", b"US"),
)
_UNDEFINED = 0xFFFFFFFF


def is_dicom(path: str | PathLike[str]) -> bool:
    """Whether the file is DICOM by its content, with or without preamble; False for what cannot be opened."""
    try:
        path = Path(path)
        if not path.is_file():
            return False
        with path.open("rb") as file:
            head = file.read(_HEAD)
        if head.startswith(_GZIP):
            with gzip.open(path) as file:
                head = file.read(_HEAD)
        return _start(head) is not None
    except (OSError, EOFError, zlib.error):
        return False


def _start(head: bytes) -> int | None:
    """Where in a file pydicom is to begin; None if it is not DICOM."""
    if head[128:132] == b"DICM":
        return 0
    places = (4 if head.startswith(b"DICM") else 0, 128, 132)
    return next((place for place in places if _elements_follow(head, place)), None)


def _elements_follow(head: bytes, place: int) -> bool:
    """Whether elements of DICOM in order begin here: those of the file meta information, or of the first group."""
    return any(_walk(head, place, order, explicit) for order, explicit in (("<", True), ("<", False), (">", True)))


def _walk(head: bytes, place: int, order: str, explicit: bool) -> bool:
    last, count, wanted = 0, 0, 3
    while place + 12 <= len(head) and count < wanted:
        group, element = struct.unpack_from(f"{order}HH", head, place)
        kind = head[place + 4 : place + 6]
        if (count == 0 and group not in (2, 8)) or (count and group << 16 | element <= last):
            return False
        if count and group != last >> 16 and last >> 16 == 2:
            return True  # another encoding may begin after the file meta information
        if not explicit:
            start, length = place + 8, struct.unpack_from(f"{order}I", head, place + 4)[0]
        elif kind in _LONG:
            start, length = place + 12, struct.unpack_from(f"{order}I", head, place + 8)[0]
        elif kind in _SHORT:
            start, length = place + 8, struct.unpack_from(f"{order}H", head, place + 6)[0]
        else:
            return False
        if length == _UNDEFINED:
            return count > 0
        if length % 2 or length > 1 << 20:
            return False
        last, place, count = group << 16 | element, start + length, count + 1
    return count >= 2


@dataclass(eq=False)
class DicomFile:
    """An open file: what it says, and what had to be assumed."""

    path: Path
    dataset: Any
    notes: Notes
    lock: threading.Lock = field(default_factory=threading.Lock)
    """pydicom converts elements when they are read first, which two threads cannot do at once."""
    affine: tuple[NDArray[np.float64], list[str]] | None = None
    """Of the volume of all frames, and what was assumed for it, once it is known."""

    @cached_property
    def frames(self) -> int:
        """How many pictures the file holds: as many as it says, if there are pixels for them."""
        values = Values([self.dataset], self.notes)
        said, held = values.number("NumberOfFrames"), self._held(values)
        wanted = max(int(said or 1), 1)
        if held is None or wanted == held or (said and wanted < held):
            return wanted
        got = "nothing" if said is None else f"{said:g}"
        self.notes.warn(f"NumberOfFrames: got {got}, but there are pixels for {held}; {held} is assumed")
        return held

    def _held(self, values: Values) -> int | None:
        """How many pictures there are pixels for, at most where they are compressed; None if that is not clear."""
        content = self.pixels.value
        if has_items(self.pixels):
            items = count_items(content) - 1  # the first is a table of offsets
            return None if items < 1 or not values.number("NumberOfFrames") else items
        sizes = [values.number(keyword) for keyword in ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated")]
        bits = float(np.prod([size or 0 for size in sizes]))
        if bits <= 0 or "42" in values.text("PhotometricInterpretation"):  # of which some samples are left out
            return None
        held = int(len(content) * 8 // bits)
        said, odd = values.number("NumberOfFrames"), held * bits / 8 % 2
        whole = said is not None or ((sizes[-1] or 0) >= 8 and len(content) - held * bits / 8 in (0, odd))
        return held if held and whole else None

    @cached_property
    def pixels(self) -> Any:
        """The element of the pixels, raw or not; None if there is none."""
        from pydicom.datadict import tag_for_keyword

        found = (self.dataset.get_item(tag_for_keyword(keyword)) for keyword in PIXELS)
        return next((element for element in found if element is not None and element.value), None)

    def frame(self, index: int, notes: Notes) -> Values:
        """What the file says of a frame."""
        return of_frame(self.dataset, index, notes)


_last: list[tuple[tuple[Any, ...], DicomFile]] = []


def open_dicom(path: Path) -> DicomFile:
    """Reads a file, or takes it as it was read if it has several frames and was the last of these.

    Raises:
        ImageError: it is not DICOM, or holds no picture.
    """
    state = path.stat()
    key = (str(path), state.st_ino, state.st_mtime_ns, state.st_size)
    for known, file in _last[:1]:
        if known == key:
            return file
    file = _read(path)
    if file.frames > 1:
        _last[:] = [(key, file)]
    return file


def _read(path: Path) -> DicomFile:
    import pydicom

    with path.open("rb") as file:
        head = file.read(_HEAD)
        whole = path.open("rb") if not head.startswith(_GZIP) else io.BytesIO(gzip.decompress(path.read_bytes()))
    notes = Notes(path)
    with whole as stream:
        start = _start(stream.read(_HEAD))
        if start is None and not path.name.lower().endswith(SUFFIXES_DICOM):
            raise ImageError(f"{path}: not a DICOM file")
        stream.seek(start or 0)
        source = io.BytesIO(stream.read()) if start else stream
        dataset = _parse(source, pydicom, notes, known=start is not None)
    if not any(keyword in dataset for keyword in PIXELS):
        raise ImageError(f"{path}: holds no picture, or is truncated before it")
    if head[128:132] != b"DICM" and not head.startswith(_GZIP):
        notes.assume("the file has no preamble")
    opened = DicomFile(path, dataset, notes)
    if opened.pixels is None:
        raise ImageError(f"{path}: holds no picture: its pixels are empty")
    return opened


def _parse(source: BinaryIO, pydicom: Any, notes: Notes, known: bool) -> Any:
    """The data set of a stream; if it is damaged, or not known to be DICOM, what is found of it by tags alone."""
    try:
        if not known:
            raise ImageError("it does not begin as DICOM files do")
        dataset = pydicom.dcmread(source, force=True)
        problem = None if any(keyword in dataset for keyword in PIXELS) else "it ends before its pixels"
    except Exception as error:  # whatever is raised on a damaged file
        dataset, problem = None, str(error)
    if problem is not None:
        source.seek(0)
        found = recover(source.read(), pydicom)
        if found is not None:
            notes.warn(f"the file is damaged ({problem}); the pixels and what belongs to them were found by their tags")
            return found
    if not known:
        raise ImageError(f"{notes.path}: not a DICOM file")
    if dataset is None:
        raise ImageError(f"{notes.path}: damaged or unsupported DICOM file: {problem}")
    element = dataset.get_item("PixelData") if "PixelData" in dataset else None
    if element is not None and getattr(element, "length", 0) == _UNDEFINED and element.value_tell:
        source.seek(element.value_tell)
        value = items_by_length(source.read())
        if value is not None and len(value) > len(element.value):
            dataset[element.tag] = element._replace(value=value)
    return dataset
