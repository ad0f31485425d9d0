"""Runs the stages one after the other, whatever becomes of each, and leaves files behind at every moment."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from .cases import gpu_backends
from .preflight import FATAL, PROBLEM, Finding
from .report import save, verdict
from .results import NEEDS_GPU, NOT_CHOSEN, RUNNING, Results, new_results
from .session import Session
from .signals import Interrupted
from .stages import NAMES, PREFLIGHT, STAGES, Stage
from .toolchain import relevant, tool_versions

PASSED, FAILED, NOTHING_TO_RUN, SIGNAL = 0, 1, 2, 128


def unknown_stages(names: Sequence[str]) -> str:
    """What is wrong with the names of stages; empty if nothing is."""
    wrong = [name for name in names if name not in NAMES]
    return f"--only: expected one of {', '.join(NAMES)}, got {', '.join(wrong)}" if wrong else ""


def run(
    out: Path, only: Sequence[str], device: str, minutes: float, deadline: float, findings: Sequence[Finding]
) -> int:
    """Runs the chosen stages, all by default; the exit code."""
    kind = device.partition(":")[0]
    not_run = {stage.name: NOT_CHOSEN for stage in STAGES if only and stage.name not in only}
    not_run |= {stage.name: NEEDS_GPU for stage in STAGES if kind == "cpu" and not stage.on_cpu}
    stages = [stage for stage in STAGES if stage.name not in not_run]
    results = new_results(out, NAMES, not_run, device, minutes)
    results.findings, results.tools, results.environment = list(findings), tool_versions(), relevant()
    _finish_preflight(results)
    save(results)
    if any(finding.level == FATAL for finding in findings):
        print(f"{verdict(results)} Wrote {results.report}")
        return NOTHING_TO_RUN
    results.backends = gpu_backends(kind)
    session = Session(results, deadline)
    code = PASSED
    try:
        _run_stages(session, stages)
        results.complete = True
        code = FAILED if results.failed else PASSED
    except Interrupted as reason:
        results.ended_by = str(reason)
        code = SIGNAL + reason.number
    except Exception as error:  # a fault of this program; what was measured must not be lost
        traceback.print_exc()
        results.ended_by = f"{type(error).__name__}: {error}"
        code = FAILED
    finally:
        session.close()
        if not save(results):
            print(json.dumps(results.to_json()))
    print(f"{verdict(results)} Wrote {results.out} and {results.report}")
    return code


def _finish_preflight(results: Results) -> None:
    stage = results.stages[PREFLIGHT]
    for finding in results.findings:
        if finding.level in (PROBLEM, FATAL):
            stage.fail(finding.what, f"{finding.found}; {finding.remedy}")
    stage.finish(time.monotonic() - results.started)


def _run_stages(session: Session, stages: Sequence[Stage]) -> None:
    for number, stage in enumerate(stages):
        result = session.results.stages[stage.name]
        session.reserved = sum(later.reserve for later in stages[number + 1 :])
        print(f"--- {stage.name}, {session.deadline - time.monotonic():.0f} s left", flush=True)
        started = time.monotonic()
        result.status = RUNNING
        try:
            stage.run(session, result)
        except Exception as error:  # the next stages say more
            traceback.print_exc()
            result.fail("the stage", f"{type(error).__name__}: {error}", traceback.format_exc())
        result.finish(time.monotonic() - started)
        save(session.results)
