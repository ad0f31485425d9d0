"""The report of a made-up result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.preflight import FATAL, NOTE, OK, Finding
from benchmarks.gpu.report import line, markdown, save, verdict
from benchmarks.gpu.results import NOT_CHOSEN, Results
from tests.benchmarks.gpu.fakes import some_results

CASE = "block 1x257x257x100h1 bfloat16"


def time_row(contender: str, ms: float, backend: str = "") -> dict[str, Any]:
    row = {"case": CASE, "contender": contender, "backend": backend, "dtype": "bfloat16", "ms": ms}
    return row | {"low": ms, "high": ms, "runs": 9, "flop": 5e11, "bytes": 1e8}


@pytest.fixture
def results(tmp_path: Path) -> Results:
    found = some_results(tmp_path)
    found.findings = [Finding("Python", OK, "3.12"), Finding("nvcc", NOTE, "not there", "set CUDA_HOME")]
    found.tools = {"driver": "570.86", "ptxas": "12.8.93 (/p)"}
    found.machine = {"gpu": "NVIDIA H100"}
    found.environment = {"DISABLE_MMA_V3": "1"}
    found.ceilings = {"copy": 2500.0, "bfloat16": 500.0}
    found.states = [{"clocks.sm": "1980 MHz", "name": "NVIDIA H100"}]
    stages = found.stages
    stages["accuracy-bf16"].rows = [
        {"case": CASE, "dtype": "bfloat16", "backend": "triton", "ok": True, "ratio": 0.98, "worst": "grad x"},
        {"case": CASE, "dtype": "bfloat16", "backend": "other", "ok": False, "ratio": 2.5, "worst": "output 0"}
        | {"faults": ["output 0: RMS error 2.50 x eager's"], "on another backend": ["mix_ffn"]},
    ]
    stages["block-times"].rows = [
        time_row("triton", 2.5, "triton"),
        time_row("triton, graph", 2.0, "triton"),
        time_row("other", 1.25, "other"),
        time_row("eager", 5.0),
    ]
    stages["times"].rows = [time_row("compile", 4.0), time_row("max-autotune", 3.0)]
    stages["times"].fail(f"time of {CASE}, other, graph", "not finished within 60 s", "Traceback ``` of it")
    stages["miscompilation"].rows = [
        {"case": "attention", "backend": "triton", "variant": "as it is", "ptxas": "12.8", "ok": True, "ratio": 1.0}
        | {"worst": "grad x"}
    ]
    stages["miscompilation"].notes = ["attention, triton: right in every way of compiling"]
    stages["memcheck"].skip("memcheck", "compute-sanitizer is not installed")
    stages["graphs"].rows = [{"case": CASE, "backend": "triton", "ok": True}]
    kernel = {"case": CASE, "backend": "triton", "kernel": "k", "launches": 1, "us": 40.0, "MB": 50.0, "DRAM %": 50.0}
    stages["ncu"].rows = [
        kernel | {"tensor cores %": 12.0, "registers": 128.0},
        {"case": CASE, "backend": "triton", "kernel": "all", "launches": 1, "us": 40.0, "MB": 50.0}
        | {"times the least traffic": 2.5},
    ]
    stages["precompile"].rows = [{"kernel": "k", "registers": 255, "spills": 40, "shared": 1024}]
    stages["fit"].rows = [
        {"backend": "triton", "dtype": "tf32", "at once": 4, "steps": 50, "seconds an image": 0.25, "ok": True}
    ]
    stages["host-time"].status = NOT_CHOSEN
    for stage in stages.values():
        if stage.status != NOT_CHOSEN:
            stage.finish(1.0)
    found.complete = True
    return found


def cells(text: str, start: str) -> list[str]:
    (found,) = [row for row in text.splitlines() if row.startswith(start)]
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_everything_that_was_found_is_in_it(results: Results) -> None:
    text = markdown(results)
    assert "could not be shown" not in text
    for expected in (
        "**FAILED: accuracy-bf16, times.**",
        "- driver: 570.86",
        "- gpu: NVIDIA H100",
        "- DISABLE_MMA_V3=1",
        "copy 2500 GB/s, bfloat16 500 TFLOP/s",
        "clocks.sm 1980 MHz",
        "| note | nvcc | not there | set CUDA_HOME |",
        "right in every way of compiling",
        "| memcheck | memcheck | compute-sanitizer is not installed |",
        "| host-time | all of it | not chosen |",
        f"- times: time of {CASE}, other, graph: not finished within 60 s",
        "Traceback ''' of it",
        "All of them move 2.5 times the least traffic.",
        "1 kernels; 1 of them spill registers.",
        "| triton | tf32 | 4 | 50 | 0.250 | as alone |",
    ):
        assert expected in text, expected
    assert "Python: 3.12" not in text, "what is fine is not listed as a finding"


def test_accuracy_names_its_backend_and_fault(results: Results) -> None:
    text = markdown(results)
    assert cells(text, f"| {CASE} | triton | 0.98")[2:] == ["0.98", "grad x", "ok"]
    other = cells(text, f"| {CASE} | other (without mix_ffn) | 2.50")
    assert other[4] == "FAILED: output 0: RMS error 2.50 x eager's"


def test_times_are_ratios_to_the_rivals_for_each_backend(results: Results) -> None:
    text = markdown(results)
    # the least time is 1 ms, by 5e11 flop at 500 TFLOP/s
    assert cells(text, f"| {CASE} | triton | 2.500")[2:] == ["2.500", "2.000", "2.00", "1.60", "1.50", "50%"]
    assert cells(text, f"| {CASE} | other | 1.250")[2:] == ["1.250", "", "4.00", "3.20", "2.40", "80%"]


def test_kernels_are_compared_with_the_measured_copy(results: Results) -> None:
    # 50 MB in 40 us are 1250 GB/s, half of the copy
    assert cells(markdown(results), "| k | 1 |") == ["k", "1", "40.0", "50.0", "50 %", "50%", "12 %", "128"]


def test_without_ceilings_there_is_no_share(results: Results) -> None:
    results.ceilings = {}
    assert cells(markdown(results), f"| {CASE} | triton | 2.500")[-1] == ""


def test_rows_of_an_unexpected_form_do_not_cost_the_report(results: Results) -> None:
    results.stages["fit"].rows = [{"neither": "fish nor fowl"}]
    text = markdown(results)
    assert "(fit: could not be shown: KeyError('backend'); see check.json)" in text
    assert "| memcheck | memcheck | compute-sanitizer is not installed |" in text


def test_both_files_are_written(results: Results) -> None:
    assert save(results)
    content = json.loads(results.out.read_text())
    assert content["stages"]["block-times"]["rows"][0]["backend"] == "triton"
    assert content["tools"]["ptxas"] == "12.8.93 (/p)"
    assert content["findings"][1]["remedy"] == "set CUDA_HOME"
    assert results.report.read_text() == markdown(results)
    assert {path.name for path in results.out.parent.iterdir()} == {"check.json", "check.md"}


def test_the_verdict(results: Results) -> None:
    results.complete, results.ended_by = False, "SIGTERM"
    assert verdict(results).startswith("**Not complete (ended by SIGTERM).** FAILED so far: accuracy-bf16")
    results.ended_by = ""
    assert "still running, or killed" in verdict(results)
    results.complete = True
    for stage in results.stages.values():
        stage.status = "ok"
    assert verdict(results) == "**All checks that were run passed.**"
    results.findings.append(Finding("GPU", FATAL, "none"))
    assert verdict(results) == "**Nothing was run: GPU: none.**"


def test_lines_on_the_console(results: Results) -> None:
    found = [line(stage.name, row) for stage in results.stages.values() for row in stage.rows]
    assert f"{CASE}, triton: 2.500 ms (2.500 to 2.500)" in found
    assert "k: 40 us, 50.0 MB" in found
    assert any(text.startswith("FAILED") and "other" in text for text in found)
    assert line("machine", {"ceiling": "copy", "value": 2500.4, "unit": "GB/s"}) == "copy: 2500 GB/s"
