"""How DICOM files want values shown: by the formulas of PS3.3, C.11.1, C.11.2 and C.11.6, worked out here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray

from msformer.io.base import show
from msformer.io.dicom import read_dicom
from msformer.io.voi import Table
from tests.msformer.io.world import GREY, save_dicom

RAMP = np.arange(0, 4096, 7, dtype=np.uint16)[:580].reshape(20, 29)


def linear(x: float, c: float, w: float) -> float:
    """C.11.2.1.2.1, from 0 to 255."""
    if x <= c - 0.5 - (w - 1) / 2:
        return 0
    return 255 if x > c - 0.5 + (w - 1) / 2 else ((x - (c - 0.5)) / (w - 1) + 0.5) * 255


def linear_exact(x: float, c: float, w: float) -> float:
    """C.11.2.1.3.2."""
    return 0 if x <= c - w / 2 else 255 if x > c + w / 2 else ((x - c) / w + 0.5) * 255


def sigmoid(x: float, c: float, w: float) -> float:
    """C.11.2.1.3.1."""
    return 255 / (1 + math.exp(min(-4 * (x - c) / w, 700)))


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(("centre", "width"), [(2048, 4096), (2048, 1000), (600.5, 80.25), (2047, 2), (100, 1)])
@pytest.mark.parametrize("function", [linear, linear_exact, sigmoid])
def test_functions(function: Any, centre: float, width: float, photometric: str, tmp_path: Path) -> None:
    tags = {"WindowCenter": centre, "WindowWidth": width, "VOILUTFunction": function.__name__.upper()}
    path = save_dicom(tmp_path / "a.dcm", RAMP, photometric, BitsStored=12, HighBit=11, **tags)
    expected = np.rint([[function(float(x), centre, width) for x in row] for row in RAMP])
    expected = 255 - expected if photometric == "MONOCHROME1" else expected
    assert np.abs(show(read_dicom(path)) - expected).max() <= (0 if function is not sigmoid else 1)


def test_a_window_after_rescaling(tmp_path: Path) -> None:
    tags = {"RescaleSlope": 0.5, "RescaleIntercept": -1024, "WindowCenter": 40, "WindowWidth": 400}
    found = show(read_dicom(save_dicom(tmp_path / "a.dcm", RAMP, Modality="CT", **tags)))
    expected = np.rint([[linear(0.5 * float(x) - 1024, 40, 400) for x in row] for row in RAMP])
    assert np.array_equal(found, expected)


def test_no_function_is_linear_and_an_unknown_one_is_said(tmp_path: Path) -> None:
    tags = {"WindowCenter": 10, "WindowWidth": 11}
    plain = show(read_dicom(save_dicom(tmp_path / "a.dcm", GREY, **tags)))
    assert plain[1].tolist() == [round(linear(x, 10, 11)) for x in range(5, 10)]
    path = save_dicom(tmp_path / "b.dcm", GREY, VOILUTFunction="CUBIC", **tags)
    with pytest.warns(UserWarning, match=r"VOILUTFunction: expected LINEAR, .*, got CUBIC; LINEAR is assumed"):
        assert np.array_equal(show(read_dicom(path)), plain)


def test_the_first_usable_of_several_windows(tmp_path: Path) -> None:
    tags = {"WindowCenter": [5, 10, 99], "WindowWidth": [0, 4, 7]}
    found = read_dicom(save_dicom(tmp_path / "a.dcm", GREY, **tags))
    assert found.window == (8, 11)
    assert found.notes == ("the window 10, 4 is taken, one of 3",)
    path = save_dicom(tmp_path / "b.dcm", GREY, WindowCenter=5, WindowWidth=-3)
    with pytest.warns(UserWarning, match="WindowWidth: expected more than 0, got -3; the window is left out"):
        assert read_dicom(path).window is None


def test_a_window_narrower_than_linear_has_any(tmp_path: Path) -> None:
    """As of values between 0 and 1; LINEAR would divide by less than 0."""
    tags = {"RescaleSlope": 0.05, "RescaleIntercept": 0, "WindowCenter": 0.5, "WindowWidth": 0.8}
    path = save_dicom(tmp_path / "a.dcm", GREY, **tags)
    expected = [[round(linear_exact(0.05 * x, 0.5, 0.8)) for x in row] for row in GREY.tolist()]
    assert np.abs(show(read_dicom(path)).astype(int) - expected).max() <= 1  # some lie between two steps


def item(entries: Any, first: int, bits: int, count: int | None = None, vr: str = "US") -> pydicom.Dataset:
    found = pydicom.Dataset()
    values = list(entries)
    number = len(values) if count is None else count
    found.add_new("LUTDescriptor", "SS" if first < 0 else "US", [number, first, bits])
    data: Any = values if vr == "US" else np.array(values, "u1" if vr == "OB" else "<u2").tobytes()
    found.add_new("LUTData", "OW" if vr == "OB" else vr, data)
    return found


def tabled(x: int, entries: Any, first: int) -> float:
    """C.11.2.1.1: what is below the first has the first entry, what is above the last the last."""
    return float(entries[min(max(x - first, 0), len(entries) - 1)])


@pytest.mark.parametrize("vr", ["US", "OW"])
@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("first", [0, 5, -8])
def test_tables_of_values_of_interest(first: int, bits: int, vr: str, tmp_path: Path) -> None:
    entries = [round(((i * 37) % 16) / 15 * (2**bits - 1)) for i in range(10)]
    pixels = GREY - 10
    tags = {"VOILUTSequence": [item(entries, first, bits, vr=vr)], "WindowCenter": 3, "WindowWidth": 2}
    found = read_dicom(save_dicom(tmp_path / "a.dcm", pixels, **tags))
    expected = [[round(tabled(x, entries, first) / (2**bits - 1) * 255) for x in row] for row in pixels.tolist()]
    assert isinstance(found.curve, Table)
    assert show(found).tolist() == expected
    assert np.array_equal(found.pixels, pixels)
    assert show(found, (0, 5))[2].tolist() == [0, 51, 102, 153, 204], "a given window is that"


def test_a_table_of_as_many_entries_as_there_are_values(tmp_path: Path) -> None:
    """65536 is written as 0."""
    entries = np.arange(65536)[::-1]
    pixels = np.array([[0, 1, 40000, 65535]], np.uint16)
    path = save_dicom(tmp_path / "a.dcm", pixels, VOILUTSequence=[item(entries, 0, 16, count=0, vr="OW")])
    assert show(read_dicom(path)).tolist() == [[255, 255, round((65535 - 40000) / 65535 * 255), 0]]


def test_a_table_of_bytes(tmp_path: Path) -> None:
    """Entries of 8 bits, one a byte, of which there are an even number."""
    sequence = [item([0, 50, 100, 200, 250, 0], 3, 8, count=5, vr="OB")]
    path = save_dicom(tmp_path / "a.dcm", GREY, VOILUTSequence=sequence)
    assert show(read_dicom(path))[:2].tolist() == [[0, 0, 0, 0, 50], [100, 200, 250, 250, 250]]


def test_tables_whose_descriptors_are_wrong(tmp_path: Path) -> None:
    path = save_dicom(tmp_path / "a.dcm", GREY, VOILUTSequence=[item([0, 4095], 0, 8)])
    with pytest.warns(UserWarning, match="says 8 bits, but entries reach 4095; 12 are taken"):
        assert show(read_dicom(path))[0].tolist() == [0, 255, 255, 255, 255]
    path = save_dicom(tmp_path / "b.dcm", GREY, VOILUTSequence=[item([0, 65535], 2, 16, count=9)])
    with pytest.warns(UserWarning, match="expected 9 entries, got 2; the last holds beyond them"):
        assert show(read_dicom(path))[0].tolist() == [0, 0, 0, 255, 255]


def test_a_modality_table(tmp_path: Path) -> None:
    """C.11.1: its entries are the values, which windows are of."""
    entries = [100, 300, 200, 900]
    tags = {"ModalityLUTSequence": [item(entries, 2, 16)], "WindowCenter": 500, "WindowWidth": 801}
    found = read_dicom(save_dicom(tmp_path / "a.dcm", GREY, **tags))
    values = [tabled(x, entries, 2) for x in range(8)]
    assert found.pixels.reshape(-1)[:8].tolist() == values
    assert show(found).reshape(-1)[:8].tolist() == [round(linear(x, 500, 801)) for x in values]


@pytest.mark.parametrize(
    ("photometric", "shape", "inverted"),
    [
        ("MONOCHROME2", "IDENTITY", False),
        ("MONOCHROME1", "INVERSE", True),
        ("MONOCHROME2", "INVERSE", True),
        ("MONOCHROME1", "IDENTITY", True),
    ],
)
def test_shape_of_the_presentation_table(photometric: str, shape: str, inverted: bool, tmp_path: Path) -> None:
    tags = {"WindowCenter": 10, "WindowWidth": 11}
    plain = show(read_dicom(save_dicom(tmp_path / "a.dcm", GREY, **tags)))
    path = save_dicom(tmp_path / "b.dcm", GREY, photometric, PresentationLUTShape=shape, **tags)
    if (photometric == "MONOCHROME1") == (shape == "INVERSE"):
        found = read_dicom(path)
    else:
        with pytest.warns(UserWarning, match=f"PresentationLUTShape {shape} contradicts {photometric}"):
            found = read_dicom(path)
    assert np.array_equal(show(found), 255 - plain if inverted else plain)


def palette(tables: list[NDArray[Any]], first: int, bits: int, **more: Any) -> dict[str, Any]:
    tags: dict[str, Any] = {}
    for name, table in zip(("Red", "Green", "Blue"), tables, strict=True):
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [len(table) % 65536, first, bits]
        tags[f"{name}PaletteColorLookupTableData"] = table.tobytes()
    return tags | more


@pytest.mark.parametrize("first", [0, 4])
@pytest.mark.parametrize(("dtype", "bits"), [(np.uint8, 8), (np.uint16, 16), (np.uint16, 8)])
def test_palettes(dtype: type, bits: int, first: int, tmp_path: Path) -> None:
    """Entries of 8 bits one a byte, or one a word; of 16 bits, the upper 8 are shown."""
    rng = np.random.default_rng(0)
    shown = rng.integers(0, 256, (3, 12))
    tables = [(row << (bits - 8) | (3 if bits == 16 else 0)).astype(dtype) for row in shown]
    path = save_dicom(tmp_path / "a.dcm", GREY.astype(np.uint8), "PALETTE COLOR", **palette(tables, first, bits))
    expected = [[[tabled(x, row, first) for row in shown] for x in line] for line in GREY.tolist()]
    assert read_dicom(path).pixels.tolist() == expected


def test_a_palette_of_signed_indexes(tmp_path: Path) -> None:
    tables = [np.arange(20, dtype=np.uint8) + i for i in range(3)]
    path = save_dicom(tmp_path / "a.dcm", GREY - 10, "PALETTE COLOR", **palette(tables, -10, 8))
    assert np.array_equal(read_dicom(path).pixels, GREY[..., None] + [0, 1, 2])


def test_a_palette_of_65536_entries(tmp_path: Path) -> None:
    table = np.arange(65536, dtype=np.uint16)
    pixels = np.array([[0, 255, 256, 65535]], np.uint16)
    path = save_dicom(tmp_path / "a.dcm", pixels, "PALETTE COLOR", **palette([table, table[::-1], table], 0, 16))
    assert read_dicom(path).pixels[0].tolist() == [[0, 255, 0], [0, 255, 0], [1, 254, 1], [255, 0, 255]]


def test_a_palette_of_16_bits_with_values_of_8_is_not_black(tmp_path: Path) -> None:
    tables = [np.arange(20, dtype=np.uint16) * (i + 3) for i in range(3)]
    path = save_dicom(tmp_path / "a.dcm", GREY.astype(np.uint8), "PALETTE COLOR", **palette(tables, 0, 16))
    with pytest.warns(UserWarning, match=r"the palette says 16 bits, but no entry has more than 8"):
        assert np.array_equal(read_dicom(path).pixels, GREY[..., None] * [3, 4, 5])


EXPANDED = [10, 40, 20, 40, 60, 80, 100, 7, 10, 40, 20, 40, 60, 80, 100, 100, 101]


@pytest.mark.parametrize("bits", [8, 16])
def test_segmented_palettes(bits: int, tmp_path: Path) -> None:
    """C.7.9.2, expanded by hand: the last step is half of one, which is rounded to the even number or cut off."""
    one = 1 if bits == 8 else 256
    data = [
        *(0, 3, 10 * one, 40 * one, 20 * one),  # discrete: 3 entries
        *(1, 4, 100 * one),  # linear to 100 in 4 steps
        *(0, 1, 7 * one),
        *(2, 2, *[0] * (4 if bits == 8 else 2)),  # indirect: 2 segments from byte 0
        *(1, 2, 101 * one),
    ]
    tags: dict[str, Any] = {}
    for name in ("Red", "Green", "Blue"):
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [len(EXPANDED), 0, bits]
        tags[f"Segmented{name}PaletteColorLookupTableData"] = np.array(data, "u1" if bits == 8 else "<u2").tobytes()
    found = read_dicom(save_dicom(tmp_path / "a.dcm", GREY.astype(np.uint8), "PALETTE COLOR", **tags)).pixels[..., 0]
    assert found.reshape(-1)[: len(EXPANDED)].tolist() == EXPANDED


def test_a_palette_that_is_missing(tmp_path: Path) -> None:
    path = save_dicom(tmp_path / "a.dcm", GREY.astype(np.uint8), "PALETTE COLOR")
    with pytest.raises(ValueError, match=r"a\.dcm: its pixels are of a palette that it does not hold"):
        read_dicom(path)
