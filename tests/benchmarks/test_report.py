"""Files, plots, and the comparison of two runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from benchmarks.cases import Case, Shape
from benchmarks.compare import FASTER, SAME, SLOWER, UNKNOWN, compare, print_comparison
from benchmarks.machine import Ceilings, Machine
from benchmarks.report import (
    Results,
    against_tokens,
    columns_of,
    machine_lines,
    markdown,
    print_group,
    read_results,
    roofline,
    size,
    write_results,
)
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
    assert names == ["results.json", "report.md", "block-float32-highest-training.png", "roofline-float32-highest.png"]
    for path in paths[2:]:
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 300
        assert f"]({path.name})" in paths[1].read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


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
    assert [path.name for path in write_results(tmp_path, results(wrong("native")))] == ["results.json", "report.md"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 1}', '{"version": 99}'])
def test_other_files_are_errors(tmp_path: Path, content: str) -> None:
    path = tmp_path / "some.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"some\.json"):
        read_results(path)


def test_tables_say_what_was_found() -> None:
    rows = [row("eager", 0.03, 0.04, 0.05, error=2e-6), row("native", 0.01, error=3e-6), wrong("compile")]
    rows[0].other_programs = 0.75
    page = markdown(results(*rows))
    lines = page.splitlines()
    (native,) = (line for line in lines if line.startswith("| native"))
    assert "| 10.0 ms |" in native
    assert "| 4.00 x |" in native
    assert "| 25% |" in native
    assert "| 3.0 MiB |" in native
    assert "| 3.0e-06 | 1.50 x |" in native
    assert "| eager | float32 | 40.0 ms | 25% |" in page
    assert "- compile is not timed: output is off by 0.5, allowed is 0.001" in lines
    assert "- other programs kept 0.8 cores busy meanwhile: do not rely on these times" in lines
    assert "2000 GF/s" in page
    assert "Interrupted" not in page
    assert "Interrupted" in markdown(replace(results(*rows), complete=False))
    console = Console(width=180, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_group(console, rows)
    printed = console.export_text()
    assert "over eager" in printed
    assert "4.00 x" in printed


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
    page = markdown(high)
    assert "## block 1x9x7x8h1, float32 highest, forward + backward" in page
    assert "## block 1x9x7x8h1, float32 high, forward + backward" in page


def test_variants_are_compared_with_the_first() -> None:
    rows = [row("native (amx)", 1.0), row("native (avx2)", 3.0), row("native (plain)", 9.0), row("eager", 6.0)]
    assert columns_of(rows) == ["eager", "native (amx)"]
    lines = markdown(results(*rows)).splitlines()
    (slow,) = (line for line in lines if line.startswith("| native (plain)"))
    assert "| 0.67 x | 0.11 x |" in slow


def test_ceilings_of_bfloat16_are_told_where_there_are_any() -> None:
    assert "AMX tiles" not in "".join(machine_lines(MACHINE, Ceilings(2e12, "a", 3e10, "b"), 3, True))
    (line,) = machine_lines(MACHINE, Ceilings(2e12, "a", 3e10, "b", 4e12, 3e13), 3, True)[-1:]
    assert line == (
        "ceilings: 2000 GF/s (a), 4000 GF/s (bfloat16 products by AVX-512 BF16), "
        "30000 GF/s (bfloat16 products on AMX tiles), 30.0 GB/s (b)"
    )


def test_a_comparison_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    comparison = compare(results(row("native", 1.0, 1.0, 1.0)), results(row("native", 2.0, 2.0, 2.0)))
    print_comparison(Console(width=180), comparison)
    printed = capsys.readouterr().out
    for part in ("block", "1x9x7x8h1", "1.00 s", "2.00 s", "2.000", SLOWER):
        assert part in printed
