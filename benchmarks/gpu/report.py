"""The report of the GPU check: a line for each row on the console, and Markdown for someone who sees it first."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence
from typing import Any

from msformer.output import complete_file, write_json

from ..tables import markdown_row
from .preflight import OK as FINE
from .results import FAILED, NEEDS_GPU, NOT_BEGUN, NOT_CHOSEN, Results, StageResult

ACCURACY = ("accuracy-bf16", "accuracy")
TIMES = ("block-times", "times", "late-times")
RIVALS = ("eager", "compile", "max-autotune")
Row = dict[str, Any]


def save(results: Results) -> bool:
    """Writes JSON and report, each whole or not at all; says so where that fails, which must not end the run."""
    try:
        write_json(results.out, results.to_json())
        with complete_file(results.report) as temporary:
            temporary.write_text(markdown(results), encoding="utf-8")
    except Exception:
        traceback.print_exc()
        return False
    return True


def line(stage: str, row: Row) -> str:
    """A row on the console; empty for what only the files have."""
    verdict = "" if "ok" not in row else "ok" if row["ok"] else "FAILED"
    subject = " ".join(str(row[k]) for k in ("case", "operation", "contender", "backend", "variant") if row.get(k))
    if "ms" in row:
        return f"{row['case']}, {row['contender']}: {row['ms']:.3f} ms ({row['low']:.3f} to {row['high']:.3f})"
    if "ratio" in row:
        faults = "; ".join(row.get("faults", []))
        return f"{verdict:<7}{subject}: {row['ratio']:.2f} x eager's error ({row['worst']}) {faults}".rstrip()
    if "ceiling" in row:
        return f"{row['ceiling']}: {row['value']:.0f} {row['unit']}"
    if "part" in row:
        return f"{verdict:<7}{row['kernels']} kernels in {row['seconds']} s {'; '.join(row['failures'])}".rstrip()
    if "kernel" in row:
        shares = f"{row['us']:.0f} us, {row['MB']:.1f} MB" if row.get("us") and row.get("MB") else ""
        return f"{row['kernel'][:60]}: {shares}" if shares else ""
    if "us" in row:
        return f"{subject}: {row['us']:.0f} us of host time a call"
    if "seconds an image" in row:
        what = f"{row['dtype']}, {row['at once']} at a time"
        return f"{verdict:<7}{subject} fit, {what}: {row['seconds an image']:.3f} s an image, {row['steps']} steps"
    if verdict:
        rest = ", ".join(f"{k} {v}" for k, v in row.items() if k not in ("ok", "case", "dtype", "backend") and v)
        return f"{verdict:<7}{stage}: {subject} {rest}".rstrip()
    return ", ".join(f"{k} {v}" for k, v in row.items())


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Markdown, and an empty line; nothing for no rows."""
    body = [markdown_row([str(cell) for cell in row]) for row in rows]
    return [markdown_row(head), markdown_row(["---"] * len(head)), *body, ""] if body else []


def markdown(results: Results) -> str:
    parts = (_stages, _machine, _accuracy, _times, _kernels, _bits, _compilation, _fit, _left_out, _failures)
    lines = ["# GPU check", "", verdict(results), ""]
    for part in parts:
        try:
            lines += part(results)
        except Exception as error:  # rows of an unexpected form must not cost the rest of the report
            lines += [f"({part.__name__.strip('_')}: could not be shown: {error!r}; see {results.out.name})", ""]
    return "\n".join(lines).rstrip() + "\n"


def verdict(results: Results) -> str:
    """One sentence."""
    fatal = [f for f in results.findings if f.level == "FATAL"]
    if fatal:
        return f"**Nothing was run: {fatal[0].what}: {fatal[0].found}.**"
    failed = [name for name, stage in results.stages.items() if stage.status == FAILED]
    if results.complete:
        return f"**FAILED: {', '.join(failed)}.**" if failed else "**All checks that were run passed.**"
    ended = f"ended by {results.ended_by}" if results.ended_by else "still running, or killed"
    return f"**Not complete ({ended}).**" + (f" FAILED so far: {', '.join(failed)}." if failed else "")


def _stages(results: Results) -> list[str]:
    rows = [
        (s.name, s.status, f"{s.seconds:.0f}", len(s.rows), len(s.skipped), len(s.failures))
        for s in results.stages.values()
    ]
    return table(("stage", "status", "seconds", "rows", "skipped", "errors"), rows)


def _machine(results: Results) -> list[str]:
    facts = results.tools | {k: v for k, v in results.machine.items() if k not in results.tools}
    lines = ["## Machine", "", f"{results.date}; backends: {', '.join(results.backends) or 'none'}", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += [f"- {name}={value}" for name, value in results.environment.items()]
    ceilings = [f"{k} {v:.0f} {'GB/s' if k == 'copy' else 'TFLOP/s'}" for k, v in results.ceilings.items()]
    if ceilings:
        lines.append(f"- ceilings (a copy of 1 GiB, reads and writes; products of 8192 x 8192): {', '.join(ceilings)}")
    lines += [f"- {_state(state)}" for state in results.states if state]
    lines.append("")
    found = [f for f in results.findings if f.level != FINE]
    rows = [(f.level, f.what, f.found, f.remedy) for f in found]
    return lines + table(("", "what", "found", "what to do"), rows)


def _state(state: dict[str, str]) -> str:
    kept = ("clocks.sm", "temperature.gpu", "power.draw", "utilization.gpu", "clocks_event_reasons.active")
    return "GPU at a time: " + ", ".join(f"{k} {state[k]}" for k in kept if k in state)


def _accuracy(results: Results) -> list[str]:
    rows = list(results.rows(*ACCURACY))
    lines = ["## Accuracy", ""] if rows else []
    if rows:
        lines += [
            "The error against float64, over that of eager PyTorch in the same dtype: 1 is as accurate as PyTorch. The "
            "largest of all outputs and gradients is shown. A case fails above 1.25 or so, or where a single value is "
            "far off.",
            "",
        ]
    lines += table(
        ("case", "backend", "error over eager's", "in", ""),
        [(r["case"], _backend(r), f"{r['ratio']:.2f}", r["worst"], _verdict(r)) for r in rows],
    )
    variants = list(results.rows("miscompilation"))
    if variants:
        lines += ["### Compiled in several ways", ""]
        lines += [f"- {note}" for note in results.stages["miscompilation"].notes] + [""]
        head = ("case", "backend", "variant", "ptxas", "error over eager's", "in", "")
        body = [
            (r["case"], _backend(r), r["variant"], r["ptxas"], f"{r['ratio']:.2f}", r["worst"], _verdict(r))
            for r in variants
        ]
        lines += table(head, body)
    return lines


def _backend(row: Row) -> str:
    others = row.get("on another backend")
    return f"{row['backend']} (without {', '.join(others)})" if others else str(row["backend"])


def _verdict(row: Row) -> str:
    return "ok" if row["ok"] else f"FAILED: {'; '.join(row.get('faults', []))}"


def _times(results: Results) -> list[str]:
    rows = list(results.rows(*TIMES))
    if not rows:
        return []
    lines = [
        "## Times",
        "",
        "Forward + backward, median of many runs by events of the GPU, the second-level cache flushed before each. "
        "Next to ours the times of the rivals divided by ours: above 1, ours is faster. As a graph: captured in a CUDA "
        "graph, which takes the host out; max-autotune does so itself, and is compared with that. Roofline share: the "
        "least time that flop and bytes allow at the ceilings above, over the better of our two times.",
        "",
    ]
    head = ("case", "backend", "ms", "as a graph, ms", *(f"{name} / ours" for name in RIVALS), "roofline share")
    return lines + table(head, [cells for case in _by_case(rows) for cells in _time_rows(results, case)])


def _by_case(rows: Iterable[Row]) -> list[dict[str, Row]]:
    """For each case its rows by contender."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["case"], {})[row["contender"]] = row
    return list(found.values())


def _time_rows(results: Results, case: dict[str, Row]) -> list[list[str]]:
    """The cells of each backend; where none was timed, the rivals' times alone."""
    name = next(iter(case.values()))["case"]
    rivals = {rival: case[rival]["ms"] for rival in RIVALS if rival in case}
    backends = dict.fromkeys(row["backend"] for row in case.values() if row["backend"])
    if not backends:
        return [[name, "none", "", "", *(f"{rivals[r]:.3f} ms" if r in rivals else "" for r in RIVALS), ""]]
    found = []
    for backend in backends:
        plain, graph = case.get(backend), case.get(f"{backend}, graph")
        best = min((row for row in (plain, graph) if row), key=lambda row: row["ms"])
        ours = (plain or best)["ms"]
        share = results.roofline_share(best)
        cells = [name, _backend(plain or best), *(f"{row['ms']:.3f}" if row else "" for row in (plain, graph))]
        against = {"max-autotune": (graph or best)["ms"]}
        cells += [f"{rivals[r] / against.get(r, ours):.2f}" if r in rivals else "" for r in RIVALS]
        found.append([*cells, "" if share is None else f"{share:.0%}"])
    return found


def _kernels(results: Results) -> list[str]:
    rows = [row for row in results.rows("ncu") if row.get("us")]
    lines: list[str] = []
    for case, backend in dict.fromkeys((row["case"], row["backend"]) for row in rows):
        group = [row for row in rows if (row["case"], row["backend"]) == (case, backend)]
        lines += [f"## Kernels of {case}, {backend}", "", "By Nsight Compute, caches flushed before each kernel.", ""]
        head = ("kernel", "launches", "us", "MB", "of DRAM's peak", "of the copy", "tensor cores", "registers")
        lines += table(head, [_kernel_cells(row, results.ceilings.get("copy")) for row in group])
        factor = group[-1].get("times the least traffic")
        lines += [f"All of them move {factor:.1f} times the least traffic.", ""] if factor else []
    return lines


def _kernel_cells(row: Row, copy: float | None) -> list[str]:
    moved = row.get("MB")
    of_copy = f"{moved * 1e3 / row['us'] / copy:.0%}" if moved and copy else ""  # MB / us is 1000 GB/s
    shares = [f"{row[k]:.0f} %" if row.get(k) is not None else "" for k in ("DRAM %", "tensor cores %")]
    registers = f"{row['registers']:.0f}" if row.get("registers") is not None else ""
    size = f"{moved:.1f}" if moved is not None else ""
    return [row["kernel"], str(row["launches"]), f"{row['us']:.1f}", size, shares[0], of_copy, shares[1], registers]


def _bits(results: Results) -> list[str]:
    names = ("repeatability", "graphs", "memcheck")
    rows = [
        (name, row.get("case", "small cases"), row["backend"], "ok" if row["ok"] else "FAILED")
        for name in names
        for row in results.rows(name)
    ]
    if not rows:
        return []
    what = (
        "Repeatability: every run gives the same bits. Graphs: a captured forward and backward gives the bits of the "
        "calls, also for new input. Memcheck: compute-sanitizer finds no bad access."
    )
    return ["## Bits, graphs and memory", "", what, "", *table(("check", "case", "backend", ""), rows)]


def _compilation(results: Results) -> list[str]:
    rows = [row for row in results.rows("precompile") if "kernel" in row]
    spilling = sorted((row for row in rows if row.get("spills")), key=lambda row: -row["spills"])
    if not rows:
        return []
    lines = ["## Compilation", "", f"{len(rows)} kernels; {len(spilling)} of them spill registers.", ""]
    head = ("kernel", "registers", "spills", "shared memory, bytes")
    return lines + table(head, [(r["kernel"], r["registers"], r["spills"], r["shared"]) for r in spilling[:20]])


def _fit(results: Results) -> list[str]:
    lines: list[str] = []
    hosts = [(r["operation"], r["backend"], f"{r['us']:.0f}") for r in results.rows("host-time")]
    if hosts:
        lines += ["## Host time of a forward call", "", *table(("operation", "backend", "us"), hosts)]
    fits = [
        (r["backend"], r["dtype"], r["at once"], r["steps"], f"{r['seconds an image']:.3f}", _same_maps(r))
        for r in results.rows("fit")
    ]
    head = ("backend", "dtype", "images at a time", "steps", "seconds an image", "label maps")
    return lines + (["## Fit of an image of 257 x 257", "", *table(head, fits)] if fits else [])


def _same_maps(row: Row) -> str:
    return "" if "ok" not in row else "as alone" if row["ok"] else "FAILED: not as alone"


def _left_out(results: Results) -> list[str]:
    stages, not_run = results.stages.values(), (NOT_BEGUN, NOT_CHOSEN, NEEDS_GPU)
    rows = [(s.name, skip["what"], skip["why"]) for s in stages for skip in s.skipped]
    rows += [(s.name, "all of it", s.status) for s in stages if s.status in not_run]
    return ["## What was skipped, and why", "", *table(("stage", "what", "why"), rows)] if rows else []


def _failures(results: Results) -> list[str]:
    lines = [text for stage in results.stages.values() for text in _failures_of(stage)]
    return ["## What failed", "", *lines] if lines else []


def _failures_of(stage: StageResult) -> list[str]:
    lines = []
    for failure in stage.failures:
        lines += [f"- {stage.name}: {failure['what']}: {failure['error'].splitlines()[0][:400]}", ""]
        if failure["traceback"]:
            lines += ["```text", failure["traceback"].replace("```", "'''").rstrip(), "```", ""]
    return lines
