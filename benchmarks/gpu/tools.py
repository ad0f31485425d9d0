"""Stages that run an item under a tool of NVIDIA: compute-sanitizer, Nsight Compute."""

from __future__ import annotations

import csv
import re
from typing import Any

from .cases import BLOCK_ROWS, SMALL, in_dtypes
from .items import Item
from .preflight import NCU_PERMISSION
from .processes import Outcome
from .results import StageResult
from .session import NO_TIME, Session
from .toolchain import find_cuda_tool

MEMCHECK_SECONDS, PROFILE_SECONDS = 25.0, 25.0
FOUND_ERRORS = 9
TIME, BYTES = "gpu__time_duration.sum", "dram__bytes.sum"
BANDWIDTH = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
TENSOR = "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed"
TENSOR_INSTRUCTIONS = "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active"
REGISTERS = "launch__registers_per_thread"
METRICS = ((TIME, BYTES, BANDWIDTH, TENSOR, REGISTERS), (TIME, BYTES, BANDWIDTH, TENSOR_INSTRUCTIONS, REGISTERS))
"""The second where this Nsight Compute does not know the first."""
_UNITS = {"nsecond": 1e-3, "ns": 1e-3, "usecond": 1.0, "us": 1.0, "msecond": 1e3, "ms": 1e3, "second": 1e6, "s": 1e6}
_BYTES = {"byte": 1e-6, "Kbyte": 1e-3, "Mbyte": 1.0, "Gbyte": 1e3, "B": 1e-6, "KB": 1e-3, "MB": 1.0, "GB": 1e3}


def memcheck(session: Session, stage: StageResult) -> None:
    """Small cases under compute-sanitizer's memcheck, once for each backend."""
    tool = find_cuda_tool("compute-sanitizer")
    if tool is None:
        stage.skip("memcheck", "compute-sanitizer is not installed")
        return
    prefix = [tool, "--tool", "memcheck", "--target-processes", "all", "--error-exitcode", str(FOUND_ERRORS)]
    cases = [case.to_json() for case in in_dtypes(SMALL, ("bfloat16", "tf32"))]
    for backend in session.results.backends:
        item = Item(
            f"memcheck of {backend}",
            ".checks:run_all",
            {"cases": cases, "backend": backend, "device": session.device},
            seconds=MEMCHECK_SECONDS,
            limit=150,
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        _run(session, stage, prefix, item, backend)


def _run(session: Session, stage: StageResult, prefix: list[str], item: Item, backend: str) -> None:
    if session.left() < item.seconds:
        stage.skip(item.name, NO_TIME)
        return

    def judge(code: int | None, text: str, found: Outcome) -> Outcome:
        return judge_memcheck(backend, code, text, found)

    outcome = session.run_under(prefix, item, judge)
    session.record(stage, item, outcome)


def judge_memcheck(backend: str, code: int | None, text: str, found: Outcome) -> Outcome:
    """What memcheck says, of its exit code, its output and what became of the item."""
    errors = re.findall(r"ERROR SUMMARY: (\d+) error", text)
    if code is None:
        return Outcome(skipped=f"not finished within {found.seconds:.0f} s")
    if found.skipped:
        return found
    if code == FOUND_ERRORS or any(int(count) for count in errors):
        first = "\n".join(line for line in text.splitlines() if line.startswith("========="))[:3000]
        count = sum(int(count) for count in errors)
        row = {"backend": backend, "ok": False, "errors": count}
        return Outcome([row], error=f"memcheck found {count} errors", traceback=first, seconds=found.seconds)
    if not errors:
        return Outcome(skipped=f"compute-sanitizer did not run: {' '.join(text.split())[-300:]}")
    if found.error:
        return found
    bad = [row["case"] for row in found.rows if not row["ok"]]
    return Outcome([{"backend": backend, "ok": not bad, "errors": 0, "not finite": bad}], seconds=found.seconds)


def profile(session: Session, stage: StageResult) -> None:
    """Every kernel of a training step of the block, under Nsight Compute, once for each backend."""
    tool = find_cuda_tool("ncu")
    if tool is None:
        stage.skip("profile", "Nsight Compute (ncu) is not installed")
        return
    case = BLOCK_ROWS[0]
    for backend in session.results.backends:
        item = Item(
            f"profile of {case}, {backend}",
            ".times:profiled",
            {"case": case.to_json(), "backend": backend, "device": session.device},
            seconds=PROFILE_SECONDS,
            limit=120,
        )
        for metrics in METRICS:
            if session.left() < item.seconds:
                stage.skip(item.name, NO_TIME)
                return
            options = ["--csv", "--page", "raw", "--print-units", "base", "--profile-from-start", "off"]
            prefix = [tool, *options, "--target-processes", "all", "--clock-control", "none"]
            outcome = session.run_under([*prefix, "--metrics", ",".join(metrics)], item, judge_profile)
            if "Failed to find metric" not in outcome.error:
                break
        session.record(stage, item, outcome)


def judge_profile(code: int | None, text: str, found: Outcome) -> Outcome:
    """A row for each kernel, by name, from what Nsight Compute prints."""
    if code is None:
        return Outcome(skipped=f"not finished within {found.seconds:.0f} s")
    if "ERR_NVGPUCTRPERM" in text:
        return Outcome(skipped=f"not permitted to profile; {NCU_PERMISSION}")
    kernels = parse_profile(text)
    errors = [line for line in text.splitlines() if line.startswith("==ERROR==")]
    if errors and not kernels:
        return Outcome(error=" ".join(errors)[:500], seconds=found.seconds)
    if found.skipped or found.error:
        return found
    if not kernels:
        return Outcome(error=f"no kernel was profiled: {' '.join(text.split())[-300:]}", seconds=found.seconds)
    head = found.rows[0]
    rows = [{"case": head["case"], "backend": head["backend"], **kernel} for kernel in kernels]
    moved = sum(kernel["MB"] or 0.0 for kernel in kernels)
    total = {"kernel": "all", "launches": sum(k["launches"] for k in kernels), "us": sum(k["us"] for k in kernels)}
    least = head["bytes"] / 1e6
    total |= {"MB": moved, "least MB": least, "times the least traffic": moved / least if moved else None}
    return Outcome([*rows, {"case": head["case"], "backend": head["backend"], **total}], seconds=found.seconds)


def parse_profile(text: str) -> list[dict[str, Any]]:
    """The kernels of a CSV of raw pages, launches of the same name together, those that take longest first."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    rows = list(csv.DictReader(line for line in lines[start:] if line.startswith('"')))
    if not rows:
        return []
    units, launches = rows[0], rows[1:]
    found: dict[str, dict[str, Any]] = {}
    for launch in launches:
        us = _number(launch.get(TIME), _UNITS.get(units.get(TIME, ""), 1e-3)) or 0.0
        kernel = found.setdefault(
            launch["Kernel Name"][:80], {"launches": 0, "us": 0.0, "MB": None, "DRAM %": None, "tensor cores %": None}
        )
        # shares are averages, weighted by time
        for name, metric in (("DRAM %", (BANDWIDTH,)), ("tensor cores %", (TENSOR, TENSOR_INSTRUCTIONS))):
            share = next((v for m in metric if (v := _number(launch.get(m))) is not None), None)
            if share is not None and us:
                kernel[name] = ((kernel[name] or 0.0) * kernel["us"] + share * us) / (kernel["us"] + us)
        moved = _number(launch.get(BYTES), _BYTES.get(units.get(BYTES, ""), 1e-6))
        kernel["MB"] = kernel["MB"] if moved is None else (kernel["MB"] or 0.0) + moved
        kernel["registers"] = _number(launch.get(REGISTERS))
        kernel["launches"] += 1
        kernel["us"] += us
    longest = sorted(found.items(), key=lambda pair: -pair[1]["us"])
    return [{"kernel": name, **kernel} for name, kernel in longest]


def _number(text: str | None, factor: float = 1.0) -> float | None:
    try:
        return float((text or "").replace(",", "")) * factor
    except ValueError:
        return None
