"""The CPU kernels under AddressSanitizer with UndefinedBehaviorSanitizer, ThreadSanitizer, and valgrind's memcheck.

    python -m tests.kernels.native.sanitizers [address] [thread] [memcheck] [--variants plain avx512_bf16]

Builds the kernels for each sanitizer in build/sanitize (five minutes a variant on one core), and runs `sample.py` in an
interpreter that has the sanitizer's library before all others. Each is first shown a fault, which it must find.

- address: reads and writes beyond tensors and scratch memory, and what C++ leaves undefined.
- thread: races. Loops run on the threads of team.cpp, all of whose waits the sanitizer sees, in place of libgomp.
- memcheck: values that nobody wrote, in what the kernels are made of (unit_tests.cpp), as AVX2 code: valgrind knows no
  AVX-512, and an interpreter with PyTorch takes it hours.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.kernels.native.sanitizers.build import ROOT, build, preload
from tests.kernels.native.test_cpp import VARIANTS, compiled

KINDS = ["address", "thread", "memcheck"]
FOLDER = ROOT / "build/sanitize"
SAMPLE = [sys.executable, "-W", "ignore", "-m", "tests.kernels.native.sanitizers.sample"]
OPTIONS = {
    "address": {"ASAN_OPTIONS": "detect_leaks=0"},  # Python does not free everything at its end
    "thread": {"TSAN_OPTIONS": f"suppressions={Path(__file__).with_name('thread.txt')}"},
}
FAULTS = {"address": ("beyond", "heap-buffer-overflow"), "thread": ("race", "data race")}
"""What each is shown, and what it says."""


def run(module: Path, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*SAMPLE, str(module), *arguments]
    variables = os.environ | environment | {"PYTHONPATH": f"{ROOT / 'kernels'}{os.pathsep}{ROOT}"}
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)


def sanitized(kind: str, variants: list[str], fuzz: int) -> bool:
    """Whether all is right; prints what was run, and what was found."""
    module = build(kind, variants, FOLDER / kind)
    environment = {"LD_PRELOAD": preload(kind), **OPTIONS[kind]}
    fault, name = FAULTS[kind]
    shown = run(module, environment | {"MSFORMER_CPU_ISA": variants[0]}, "--fault", fault)
    right = name in shown.stderr and shown.returncode != 0
    print(f"{kind}: {'finds' if right else 'DOES NOT FIND'} the fault that it is shown ({fault})", flush=True)
    cases = ["small", "medium", "large", "empty"] if kind == "address" else ["small", "medium"]
    for variant in variants:
        done = run(module, environment | {"MSFORMER_CPU_ISA": variant}, "--fuzz", str(fuzz), "--cases", *cases)
        right &= done.returncode == 0
        last = (done.stdout.splitlines() or ["nothing"])[-1]
        print(f"{kind}: {last}: {'clean' if done.returncode == 0 else f'exit status {done.returncode}'}", flush=True)
        if done.returncode:
            print(done.stdout[-2000:], done.stderr[-8000:], sep="\n")
    return right


def memcheck() -> bool:
    """Whether memcheck finds nothing in the unit tests of the kernels' parts."""
    with tempfile.TemporaryDirectory() as folder:
        avx2 = next(variant for variant in VARIANTS if variant.name == "avx2")
        program = compiled(avx2, Path(folder, "unit_tests"), "-g")
        command = [str(shutil.which("valgrind")), "--error-exitcode=9", str(program)]
        variables = os.environ | {"OMP_NUM_THREADS": "1"}  # what libgomp keeps for its threads counts as lost
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    clean = "ERROR SUMMARY: 0 errors" in done.stderr  # sums may differ: valgrind's arithmetic is not the processor's
    summary = [line for line in done.stderr.splitlines() if "ERROR SUMMARY" in line]
    print(f"memcheck: unit tests, avx2: {''.join(summary)}", flush=True)
    if not clean:
        print(done.stderr[-8000:])
    return clean


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kinds", nargs="*", default=KINDS, metavar="|".join(KINDS))
    parser.add_argument("--variants", nargs="+", default=["plain", "avx512_bf16", "emulated_tiles"])
    parser.add_argument("--fuzz", type=int, default=300, help="how many calls of the fuzzer")
    options = parser.parse_args()
    if unknown := set(options.kinds) - set(KINDS):
        parser.error(f"expected some of {', '.join(KINDS)}, got {', '.join(sorted(unknown))}")
    os.environ["MSFORMER_EMULATE_TILES"] = "1"
    right = True
    for kind in options.kinds:
        if kind != "memcheck":
            right &= sanitized(kind, options.variants, options.fuzz)
        elif shutil.which("valgrind"):
            right &= memcheck()
        else:
            print("memcheck: valgrind is not installed")
            right = False
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
