"""What a DICOM file says of a frame, read leniently: a number that is written wrongly is read as it is meant, or left
out, and never keeps the pixels from being read."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msformer.io.base import Notes

_BINARY = {"US": "u2", "SS": "i2", "UL": "u4", "SL": "i4", "UV": "u8", "SV": "i8", "FL": "f4", "FD": "f8", "OW": "u2"}

_AMBIGUOUS = "US or SS"

_NUMBERS_ONLY = re.compile(rb"[0-9+\-.,eEdD \\\0\t]+")

_MACROS = (
    *("PixelMeasuresSequence", "PlanePositionSequence", "PlaneOrientationSequence"),
    *("PixelValueTransformationSequence", "FrameVOILUTSequence"),
)
"""Functional groups that say what ordinary files say of their only picture."""


class Values:
    """The elements of one frame: those of its own functional groups, else shared ones, else those of the file."""

    def __init__(self, layers: Sequence[Any], notes: Notes, signed: bool = False) -> None:
        """`signed`: how to read elements of which the file does not say whether they are."""
        self._layers, self._notes, self.signed = layers, notes, signed

    def element(self, keyword: str) -> Any:
        """The first that is not empty, raw if it was not read before; None if there is none."""
        from pydicom.datadict import tag_for_keyword

        for layer in self._layers:
            found = layer.get_item(tag_for_keyword(keyword))
            if found is not None and found.value is not None and _length(found.value):
                return found
        return None

    def numbers(self, keyword: str, count: int | None = None) -> NDArray[np.float64]:
        """An element's values; none if it is missing, no number, not finite or has not `count` values."""
        element = self.element(keyword)
        if element is None:
            return np.empty(0)
        values = _parse(element, keyword, self.signed)
        if values is None or not np.isfinite(values).all() or count not in (None, values.size):
            wanted = "numbers" if count is None else f"{count} number{'s' * (count > 1)}"
            self._notes.warn(f"{keyword}: expected {wanted}, got {_excerpt(element.value)}; it is left out")
            return np.empty(0)
        if isinstance(element.value, bytes) and _NUMBERS_ONLY.fullmatch(element.value) and b"," in element.value:
            self._notes.warn(f"{keyword}: {_excerpt(element.value)} is read as {', '.join(f'{v:g}' for v in values)}")
        return values

    def number(self, keyword: str) -> float | None:
        """The first of an element's values; None if there is none."""
        values = self.numbers(keyword)
        return float(values[0]) if values.size else None

    def text(self, keyword: str) -> str:
        """An element's text, without blanks at its ends; "" if it is missing."""
        element = self.element(keyword)
        if element is None:
            return ""
        value = element.value
        plain = value.decode("latin-1") if isinstance(value, bytes) else str(value)
        return plain.strip(" \0\t\r\n")

    def data(self, keyword: str, bits: int) -> NDArray[np.uint16]:
        """An element's entries of 8 or 16 bits, in whichever way they are stored."""
        element = self.element(keyword)
        if element is None:
            return np.empty(0, np.uint16)
        if isinstance(element.value, bytes):
            little = getattr(element, "is_little_endian", self._little())
            if bits == 8 and not little:  # two of them in each word
                content = np.frombuffer(element.value[: len(element.value) // 2 * 2], "u1").reshape(-1, 2)[:, ::-1]
                return content.reshape(-1).astype(np.uint16)
            kind, size = "u1" if bits == 8 else "<u2" if little else ">u2", bits // 8
            return np.frombuffer(element.value, kind, len(element.value) // size).astype(np.uint16)
        words = np.atleast_1d(np.asarray(element.value, np.int64)).astype(np.uint16)
        return words if bits == 16 else words.astype("<u2").view(np.uint8).astype(np.uint16)

    def _little(self) -> bool:
        """Whether the file is little-endian; of elements that were read before, nothing else says so."""
        return all(getattr(layer, "original_encoding", (None, True))[1] is not False for layer in self._layers)

    def items(self, keyword: str) -> list[Values]:
        """The items of a sequence; none if it is missing or damaged."""
        from pydicom.datadict import tag_for_keyword

        for layer in self._layers:
            found = sequence(layer, tag_for_keyword(keyword), self._notes)
            if found:
                return [Values([item], self._notes, self.signed) for item in found]
        return []


def of_frame(dataset: Any, index: int, notes: Notes) -> Values:
    """What a data set says of a frame, counted from 0."""
    from pydicom.datadict import tag_for_keyword

    layers: list[Any] = []
    places = {"PerFrameFunctionalGroupsSequence": index, "SharedFunctionalGroupsSequence": 0}
    groups = [sequence(dataset, tag_for_keyword(name), notes)[i : i + 1] for name, i in places.items()]
    for macro in _MACROS:  # of a frame, or shared, never of both
        found = [sequence(group, tag_for_keyword(macro), notes)[:1] for part in groups for group in part]
        layers += next((items for items in found if items), ())
    values = Values([*layers, dataset], notes)
    values.signed = values.number("PixelRepresentation") == 1
    return values


def sequence(dataset: Any, tag: Any, notes: Notes) -> Sequence[Any]:
    """The items of a sequence; none if it is missing, or damaged, which is noted."""
    from pydicom.datadict import keyword_for_tag

    if tag not in dataset:
        return ()
    try:
        value = dataset[tag].value
    except Exception as error:  # whatever is raised on damaged items
        notes.warn(f"{keyword_for_tag(tag)} is damaged and left out: {error}")
        return ()
    return value if type(value).__name__ == "Sequence" else ()


def _length(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else 1


def _excerpt(value: Any) -> str:
    plain = value.decode("latin-1") if isinstance(value, bytes) else str(value)
    return repr(plain if len(plain) <= 40 else f"{plain[:40]}...")


def _parse(element: Any, keyword: str, signed: bool) -> NDArray[np.float64] | None:
    """The numbers of an element, raw or read before; None if it holds none."""
    from pydicom.datadict import dictionary_VR

    value, usual = element.value, dictionary_VR(element.tag)
    if not isinstance(value, bytes):
        parts = [value] if isinstance(value, str) or not hasattr(value, "__iter__") else list(value)
        return _from_texts([str(part) for part in parts])
    order = "<" if getattr(element, "is_little_endian", True) else ">"
    written = element.VR or usual
    as_text: Callable[[], Any] = lambda: _from_texts(value.decode("latin-1").split("\\"))  # noqa: E731
    if _NUMBERS_ONLY.fullmatch(value) and (usual in ("DS", "IS") or written not in (*_BINARY, "UN", _AMBIGUOUS)):
        return as_text()
    for kind in (written, usual):
        layout = ("i2" if signed else "u2") if kind == _AMBIGUOUS else _BINARY.get(kind)
        if layout is not None:
            size = int(layout[1])
            return np.frombuffer(value, order + layout).astype(np.float64) if len(value) % size == 0 else None
    return as_text()


def _from_texts(texts: Sequence[str]) -> NDArray[np.float64] | None:
    """Numbers with a point or a comma before the fraction, the other between thousands, and blanks anywhere; None if
    one is no number."""
    found = []
    for text in texts:
        plain = re.sub(r"[\s\0]", "", text)
        between = "." if plain.rfind(",") > plain.rfind(".") else ","
        plain = plain.replace(between, "").replace(",", ".")
        try:
            found.append(float(plain))
        except ValueError:
            return None
    return np.array(found)
