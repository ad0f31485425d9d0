"""Checks and times the GPU kernels, in one command and less than eight minutes:

    python benchmarks/gpu_check.py [--out gpu-check.json] [--minutes 8] [--only STAGE ...]

Needs torch and Triton, not an installed msformer; an installed one has it as `python -m msformer.benchmarks.gpu_check`.
Writes gpu-check.md (the report, to be read first), gpu-check.json and gpu-check.log (what the processes print). After
every row the first two hold all that is known so far, also when the command is interrupted. A stage that fails is
recorded, and the others run. What there is no time left for is named.

The stages are those of benchmarks/gpu/stages.py, the flagship (MS-Former's block, 257 x 257 tokens of 100 channels)
first: preflight, machine, precompile, accuracy-bf16, block-times, accuracy, miscompilation, repeatability, graphs,
host-time, times, memcheck, ncu, fit, late-times. With TRITON_INTERPRET=1 and --device cpu only the checks run, in
Triton's interpreter.

A rival that does not compile or takes too long is skipped, not a failure.

Exit code: 0, or 1 if something failed, 2 if nothing can be run here, 128 + its number after a signal.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

if not __package__:  # run by its path, this file is part of no package; not installed, all are found where they lie
    ROOT = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(ROOT), *([] if find_spec("msformer_kernels") else [str(ROOT / "kernels")])]
    from benchmarks import gpu_check

    sys.exit(gpu_check.main())

from .gpu.preflight import preflight
from .gpu.signals import interruptible

NOTHING_TO_RUN = 2
WRAP_UP = 10.0
"""Seconds at the end that are kept for ending processes and writing files."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"), help="the report goes beside it, as .md")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", action="append", metavar="STAGE", help="run this stage alone; may be repeated")
    options = parser.parse_args(arguments)
    if options.out.suffix in (".md", ".log"):
        parser.error(f"--out: {options.out} is the name of the report or log; expected one such as gpu-check.json")
    deadline = time.monotonic() + 60 * options.minutes - WRAP_UP
    findings = preflight(options.device.partition(":")[0])
    for finding in findings:
        print(finding, flush=True)
    if find_spec("torch") is None:
        return NOTHING_TO_RUN  # without torch not even the stages can be imported
    from msformer.output import OutputError, prepare_folder

    from .gpu.run import run, unknown_stages

    only = options.only or []
    if wrong := unknown_stages(only):
        parser.error(wrong)
    try:
        prepare_folder(options.out.absolute().parent)
    except OutputError as error:
        parser.error(f"--out: {error}")
    with interruptible():
        return run(options.out, only, options.device, options.minutes, deadline, findings)


if __name__ == "__main__":
    sys.exit(main())
