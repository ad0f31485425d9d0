"""Random calls of the operators, checked against the reference.

    python -m tests.kernels.fuzzing --cases 10000
    python -m tests.kernels.fuzzing --only mix_ffn --seconds 60
    python -m tests.kernels.fuzzing --case "mix_ffn height=5 dtype=bf16 seed=3"

Each variant of the CPU code is a process of its own. A failure is made smaller, as long as it fails, and printed as the
command that repeats it; the recipe belongs into found.txt, whose lines are tests.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
COMMAND = "python -m tests.kernels.fuzzing --case"
BACKENDS = ("native", "cuda", "triton")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only the recipes that hold this text, such as an operator")
    parser.add_argument("--case", help="one recipe")
    parser.add_argument("--of-variant", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ |= {"TRITON_INTERPRET": "1", "MSFORMER_CUDA_EMULATE": "1"}
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if options.case is not None:
        return run_one(options.case)
    return run_variant(options) if options.of_variant else run_all(options)


def run_one(text: str) -> int:
    words = (word.partition("=") for word in text.split())
    if variant := next((value for name, _, value in words if name == "variant"), ""):
        os.environ["MSFORMER_CPU_ISA"] = variant  # before the kernels are imported
    from tests.kernels.fuzzing.recipe import Recipe
    from tests.kernels.fuzzing.search import judged

    found = judged(Recipe.parse(text))
    print("\n".join(found) or "right")
    return 1 if found else 0


def run_all(options: argparse.Namespace) -> int:
    """One process after the other, each with its share of the time."""
    from msformer_kernels import _native

    variants, start = _native.available_isas(), time.monotonic()
    print(f"seed {options.seed}, cases {options.first} to {options.first + options.cases - 1}, ", end="")
    print(f"at most {options.seconds:g} s, variants {', '.join(variants)}", flush=True)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        current = Path(folder, "current")
        for i, variant in enumerate(variants):
            until = time.monotonic() + (options.seconds - (time.monotonic() - start)) / (len(variants) - i)
            first, last, status = options.first, options.first + options.cases, -1
            while status not in (0, 1) and first < last:
                command = [sys.executable, "-m", __spec__.name, "--of-variant", variant, str(current)]
                command += ["--first", str(first), "--cases", str(last - first), "--seed", str(options.seed)]
                command += ["--only", options.only, "--seconds", str(max(0.0, until - time.monotonic()))]
                environment = os.environ | {"MSFORMER_CPU_ISA": variant}
                status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
                wrong += status != 0
                if status not in (0, 1):
                    number, _, recipe = current.read_text().partition(" ")
                    print(f"  {COMMAND} {shlex.quote(recipe)}\n    ended the process with {status}", flush=True)
                    first = int(number) + 1
    print(f"{'FAILED' if wrong else 'right'}, {time.monotonic() - start:.0f} s")
    return 1 if wrong else 0


def run_variant(options: argparse.Namespace) -> int:
    from msformer_kernels import _native
    from tests.kernels.fuzzing.recipe import Recipe, draw
    from tests.kernels.fuzzing.search import search

    variant, current = options.of_variant
    variants, start = _native.available_isas(), time.monotonic()
    numbers = range(options.first, options.first + options.cases)

    def recipes() -> Iterator[Recipe]:
        for number in (n for n in numbers if variants[n % len(variants)] == variant):
            recipe = draw(options.seed, number, BACKENDS, variant)
            if options.only in str(recipe):
                Path(current).write_text(f"{number} {recipe}")  # if it ends the process, this is left
                yield recipe

    found = search(recipes(), start + options.seconds)
    for recipe, faults in found.failures:
        print(f"  {COMMAND} {shlex.quote(str(recipe))}", *(f"    {fault}" for fault in faults), sep="\n")
    counts = ", ".join(f"{count} {name}" for name, count in sorted(found.counts.items()))
    stopped = ", stopped by the time limit" if found.stopped else ""
    print(f"{variant}: {counts}; {len(found.failures)} failures{stopped}, {time.monotonic() - start:.0f} s", flush=True)
    return 1 if found.failures else 0


if __name__ == "__main__":
    sys.exit(main())
