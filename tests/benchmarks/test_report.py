"""Files, plots, and the comparison of two runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from benchmarks.cases import Case, Shape
from benchmarks.compare import FASTER, SAME, SLOWER, UNKNOWN, compare
from benchmarks.compare import document as compared
from benchmarks.documents import markdown, print_table
from benchmarks.machine import Ceilings, Machine
from benchmarks.plots import against_tokens, roofline
from benchmarks.records import Results, read_results, save_to
from benchmarks.report import case_table, columns_of, document, machine_lines, size, write_results
from benchmarks.rows import MEASURED, WRONG, Row, new_row
from benchmarks.tables import duration

MACHINE = Machine("cpu", 2, 2**30, "os", "3", "2", "0", 2, "plain", ("reference",), "today")
BLOCK = Case("block", Shape(1, 9, 7, 8), "float32", "training")


def row(rival: str, *samples: float, case: Case = BLOCK, error: float = 1e-6) -> Row:
    found = new_row(case, rival)
    found.status, found.samples, found.error, found.peak_memory = MEASURED, list(samples), error, 3 * 2**20
    found.mode, found.share_of_ceiling = "float32", 0.25
    return found


def results(*rows: Row) -> Results:
    return Results(MACHINE, Ceilings(2e12, "a", 3e10, "b"), rounds=3, rows=list(rows), complete=True)


def wrong(rival: str) -> Row:
    found = row(rival)
    found.status, found.reason = WRONG, "output is off by 0.5, allowed is 0.001"
    return found


def test_results_come_back_from_their_file(tmp_path: Path) -> None:
    larger = replace(BLOCK, shape=Shape(1, 30, 20, 8))
    written = results(
        row("eager", 3.0, 4.0, 5.0), row("native", 1.0, 2.0, 9.0), row("native", 7.0, case=larger), wrong("compile")
    )
    paths = write_results(tmp_path, written)
    assert read_results(paths[0]) == written
    assert json.loads(paths[0].read_text())["rows"][1]["seconds"] == 2.0
    names = [path.name for path in paths]
    plots = ["block-float32-highest-training.svg", "roofline-float32-highest.svg"]
    assert names == ["results.json", "report.md", "report.html", *plots]
    page = paths[2].read_text()
    for path in paths[3:]:
        picture = ElementTree.parse(path).getroot()
        assert picture.tag == "{http://www.w3.org/2000/svg}svg"
        assert "native" in picture.attrib["aria-label"]
        assert f"]({path.name})" in paths[1].read_text()
        assert path.read_text() in page
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_names_are_no_markup(tmp_path: Path) -> None:
    bad = "native (<b>$x_{</b>|[a](b)\x1b)"
    found = results(row("eager", 3.0), row(bad, 1.0))
    found.machine = replace(MACHINE, processor="<script>alert(1)</script>")
    paths = write_results(tmp_path, found)
    for path in paths[1:]:
        text = path.read_text()
        assert "<script>alert" not in text
        assert "<b>$" not in text
        assert "\x1b" not in text
    assert r"native (&lt;b&gt;$x\_{&lt;/b&gt;\|\[a\](b)\\x1b)" in paths[1].read_text()
    assert "default-src &#39;none&#39;" in paths[2].read_text()


@pytest.mark.parametrize("seconds", [1.0, 1e-3])
def test_every_point_is_within_its_plot(seconds: float) -> None:
    """However far below the ceilings of the roofline."""
    larger = replace(BLOCK, shape=Shape(8, 30, 20, 8))
    rows = [row("eager", seconds), row("native", 2 * seconds), row("native", 3 * seconds, case=larger)]
    names = ["eager", "native"]
    roof = roofline(rows, names, Ceilings(2e12, "", 3e10, ""), "float32 highest")
    figures = [against_tokens(rows, names, "block"), roof]
    for panel in (axes for figure in figures for axes in figure.axes):
        (left, right), (bottom, top) = panel.get_xlim(), panel.get_ylim()
        for line in panel.lines:
            assert all(left <= x <= right for x in line.get_xdata())
            assert all(bottom <= y <= top for y in line.get_ydata())


def test_results_without_any_time_can_be_written(tmp_path: Path) -> None:
    names = [path.name for path in write_results(tmp_path, results(wrong("native")))]
    assert names == ["results.json", "report.md", "report.html"]
    assert "native is not timed: output is off by 0.5" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("[]", "it has no version"),
        ("{}", "it has no version"),
        ('{"version": 1}', "machine: field required"),
        ('{"version": 99}', "version: expected 1, got 99"),
    ],
)
def test_other_files_are_errors(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "some.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"some\.json: .*{message}"):
        read_results(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": [1.0, "fast"]}, r"rows\.0\.samples\.1: .*valid number"),
        ({"samples": [0.0]}, r"rows\.0\.samples: expected numbers above 0, got \[0\.0\]"),
        ({"samples": [float("nan")]}, r"rows\.0\.samples: expected numbers above 0"),
        ({"operation": "conv"}, r"rows\.0\.operation: expected one of attention, .*, got 'conv'"),
        ({"shape": "big"}, r"rows\.0\.shape: 'big' is not a shape"),
        ({"status": "fine"}, r"rows\.0\.status: expected one of measured"),
        ({"flop": 0}, r"rows\.0\.flop: expected numbers above 0"),
    ],
)
def test_a_damaged_row_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    content = results(row("native", 1.0)).to_json()
    content["rows"][0] |= change
    (tmp_path / "some.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_results(tmp_path / "some.json")


def test_a_machine_has_a_file_of_its_own(tmp_path: Path) -> None:
    found = results(row("native", 1.0))
    found.machine = replace(MACHINE, processor="Intel(R) Xeon(R) @ 2.0GHz", torch="2.13.0+cpu", threads=1)
    path = save_to(tmp_path, found)
    assert path.name == "intel-r-xeon-r-2.0ghz-2-cores-1-threads-torch-2.13.0-cpu.json"
    assert read_results(path) == found


def test_tables_say_what_was_found() -> None:
    rows = [row("eager", 0.03, 0.04, 0.05, error=2e-6), row("native", 0.01, error=3e-6), wrong("compile")]
    rows[0].other_programs = 0.75
    page = markdown(document(results(*rows)))
    lines = page.splitlines()
    (native,) = (line for line in lines if line.startswith("| native"))
    assert "| 10.0 ms |" in native
    assert "| 4.00 x |" in native
    assert "| 25% |" in native
    assert "| 3.0 MiB |" in native
    assert "| 3.0e-06 | 1.50 x |" in native
    assert "| eager | float32 | 40.0 ms | 25% |" in page
    assert "| block 1x9x7x8h1, float32 highest, forward + backward | native | 10.0 ms | 4.00 x |" in page
    assert "- compile is not timed: output is off by 0.5, allowed is 0.001" in lines
    assert "- other programs kept 0.8 cores busy meanwhile: do not rely on these times" in lines
    assert "2000 GF/s" in page
    assert "Interrupted" not in page
    assert "Interrupted" in markdown(document(replace(results(*rows), complete=False)))
    console = Console(width=180, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_table(console, case_table(rows))
    printed = console.export_text()
    assert "times as fast" in printed
    assert "as eager" in printed
    assert "4.00 x" in printed


def test_a_gain_within_the_spreads_is_marked() -> None:
    rows = [row("eager", 3.0, 4.0, 5.0), row("native", 2.0, 3.0, 4.0), row("compile", 1.0, 1.1, 1.2)]
    shown = {cells[0]: cells[4:7] for cells in case_table(rows).rows}
    assert case_table(rows).columns[4:7] == [f"times as fast\nas {name}" for name in ("eager", "compile", "native")]
    assert shown["native"] == ["~1.33 x", "0.37 x", ""]
    assert shown["compile"] == ["3.64 x", "", "2.73 x"]


def test_what_was_left_out_is_told() -> None:
    found = results(row("native", 1.0))
    found.left_out = ["CPU variant amx: Linux does not permit AMX tiles"]
    assert "- not run: CPU variant amx: Linux does not permit AMX tiles" in markdown(document(found)).splitlines()


def test_units() -> None:
    found = [duration(seconds) for seconds in (1.234, 0.1234, 0.01234, 1.2e-6)]
    assert found == ["1.23 s", "123 ms", "12.3 ms", "1.20 µs"]
    assert size(2.5 * 2**20) == "2.5 MiB"


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ((1.0, 1.1, 1.2), (2.0, 2.1, 2.2), SLOWER),
        ((2.0, 2.1, 2.2), (1.0, 1.1, 1.2), FASTER),
        ((1.0, 1.1, 1.2), (1.05, 1.15, 1.25), SAME),
        ((1.0, 2.0, 3.0), (2.0, 3.5, 5.0), SAME),
        ((1.0,), (2.0, 2.1, 2.2), UNKNOWN),
    ],
)
def test_a_change_is_marked_if_it_is_larger_than_the_spread(
    old: tuple[float, ...], new: tuple[float, ...], verdict: str
) -> None:
    (change,) = compare(results(row("native", *old)), results(row("native", *new))).changes
    assert change.verdict == verdict
    assert change.ratio == pytest.approx(sorted(new)[len(new) // 2] / sorted(old)[len(old) // 2])


def test_rows_of_one_file_and_another_machine_are_named() -> None:
    old = results(row("native", 1.0), row("eager", 1.0))
    new = results(row("native", 1.0), row("published", 1.0))
    new.machine = replace(MACHINE, threads=1, date="tomorrow")
    found = compare(old, new)
    assert [key[-1] for key in found.only_old] == ["eager"]
    assert [key[-1] for key in found.only_new] == ["published"]
    assert found.machine == ["threads: 2 -> 1"]
    (broken,) = compare(results(row("native", 1.0)), results(wrong("native"))).changes
    assert broken.verdict == "measured -> wrong"


def test_precisions_are_not_mixed(tmp_path: Path) -> None:
    """A file from before there were any is of "highest"."""
    old = results(row("native", 1.0))
    content = old.to_json()
    del content["rows"][0]["precision"]
    (tmp_path / "old.json").write_text(json.dumps(content))
    assert read_results(tmp_path / "old.json") == old
    high = results(row("native", 1.0), row("native", 2.0, case=replace(BLOCK, precision="high")))
    found = compare(old, high)
    assert [change.ratio for change in found.changes] == [1.0]
    assert found.only_new == [("block", "1x9x7x8h1", "float32 high", "training", "native")]
    page = markdown(document(high))
    assert "## block 1x9x7x8h1, float32 highest, forward + backward" in page
    assert "## block 1x9x7x8h1, float32 high, forward + backward" in page


def test_variants_are_compared_with_the_first() -> None:
    rows = [row("native (amx)", 1.0), row("native (avx2)", 3.0), row("native (plain)", 9.0), row("eager", 6.0)]
    assert columns_of(rows) == ["eager", "native (amx)"]
    lines = markdown(document(results(*rows))).splitlines()
    (slow,) = (line for line in lines if line.startswith("| native (plain)"))
    assert "| 0.67 x | 0.11 x |" in slow


def test_ceilings_of_bfloat16_are_told_where_there_are_any() -> None:
    assert "AMX tiles" not in "".join(machine_lines(MACHINE, Ceilings(2e12, "a", 3e10, "b"), 3, True))
    (line,) = machine_lines(MACHINE, Ceilings(2e12, "a", 3e10, "b", 4e12, 3e13), 3, True)[-1:]
    assert line == (
        "ceilings: 2000 GF/s (a), 4000 GF/s (bfloat16 products by AVX-512 BF16), "
        "30000 GF/s (bfloat16 products on AMX tiles), 30.0 GB/s (b)"
    )


def test_a_comparison_is_a_report() -> None:
    comparison = compare(results(row("native", 1.0, 1.0, 1.0)), results(row("native", 2.0, 2.0, 2.0), wrong("eager")))
    found = compared(comparison)
    (table,) = found.tables
    assert table.rows == [[f"{BLOCK.operation} 1x9x7x8h1, float32 highest, forward + backward", "native", *CHANGED]]
    assert table.notes == ["only in the second file: block 1x9x7x8h1 float32 highest training eager"]
    assert [plot.name for plot in found.plots] == ["comparison"]
    assert "1 slower" in found.plots[0].alt
    nothing = compared(compare(results(row("native", 1.0)), results(row("eager", 1.0))))
    assert nothing.plots == []
    assert "the files have no row in common" in nothing.tables[0].notes


CHANGED = ["1.00 s", "2.00 s", "2.000", SLOWER]
