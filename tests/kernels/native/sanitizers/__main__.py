"""The CPU kernels under AddressSanitizer with UndefinedBehaviorSanitizer, ThreadSanitizer, and valgrind's memcheck.

    python -m tests.kernels.native.sanitizers [address] [thread] [memcheck] [--variants plain avx512_bf16]

Builds the kernels for each sanitizer in build/sanitize (five minutes a variant on one core), and runs `sample.py` in an
interpreter that has the sanitizer's library before all others. Each is first shown a fault, which it must find.

- address: reads and writes beyond tensors and scratch memory, and what C++ leaves undefined.
- thread: races. Loops run on the threads of openmp.cpp, all of whose waits the sanitizer sees, in place of libgomp.
- memcheck: values that nobody wrote, in the module that is installed, as AVX2 code (valgrind knows no AVX-512). Errors
  count where a frame of ours is among the callers; Python and PyTorch have some of their own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from tests.kernels.native.sanitizers.build import ROOT, build, preload

FOLDER = ROOT / "build/sanitize"
SAMPLE = [sys.executable, "-W", "ignore", "-m", "tests.kernels.native.sanitizers.sample"]
OPTIONS = {
    "address": {"ASAN_OPTIONS": "detect_leaks=0"},  # Python does not free everything at its end
    "thread": {"TSAN_OPTIONS": f"suppressions={Path(__file__).with_name('thread.txt')}"},
}
FAULTS = {"address": ("beyond", "heap-buffer-overflow"), "thread": ("race", "data race")}
"""What each is shown, and what it says."""
MEMCHECK = ["--tool=memcheck", "--error-limit=no", "--num-callers=30", "--xml=yes"]


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


def memcheck(fuzz: int) -> bool:
    """Whether memcheck finds nothing in our code."""
    from msformer_kernels import _native

    module = Path(str(_native.__file__))
    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder, "errors.xml")
        command = [str(shutil.which("valgrind")), *MEMCHECK, f"--xml-file={errors}", *SAMPLE, str(module)]
        command += ["--cases", "small", "empty", "--fuzz", str(fuzz), "--threads", "1", "--alone"]
        environment = {"PYTHONMALLOC": "malloc", "MSFORMER_CPU_ISA": "avx2", "OMP_NUM_THREADS": "1"}
        variables = os.environ | environment | {"PYTHONPATH": f"{ROOT / 'kernels'}{os.pathsep}{ROOT}"}
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"memcheck: exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
            return False
        ours = ours_of(errors, module.name)
    print(f"memcheck: {done.stdout.splitlines()[-1]}: {'clean' if not ours else f'{len(ours)} errors'}", *ours, sep="\n")
    return not ours


def ours_of(errors: Path, module: str) -> list[str]:
    """The errors with a frame of the module, each in a few lines."""
    found = []
    for error in ElementTree.parse(errors).getroot().iter("error"):
        frames = error.findall("./stack[1]/frame")
        if any(module in (frame.findtext("obj") or "") for frame in frames):
            what = error.findtext("what") or error.findtext("./xwhat/text") or ""
            found.append("\n    ".join([what, *(frame.findtext("fn") or "?" for frame in frames[:8])]))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kinds", nargs="*", default=["address", "thread", "memcheck"], metavar="address|thread|memcheck")
    parser.add_argument("--variants", nargs="+", default=["plain", "avx512_bf16", "emulated_tiles"])
    parser.add_argument("--fuzz", type=int, default=300, help="how many calls of the fuzzer (memcheck: a tenth)")
    options = parser.parse_args()
    if unknown := set(options.kinds) - {*FAULTS, "memcheck"}:
        parser.error(f"expected address, thread or memcheck, got {', '.join(sorted(unknown))}")
    os.environ["MSFORMER_EMULATE_TILES"] = "1"
    right = True
    for kind in options.kinds:
        if kind == "memcheck" and shutil.which("valgrind") is None:
            print("memcheck: valgrind is not installed")
            right = False
        else:
            right &= memcheck(options.fuzz // 10) if kind == "memcheck" else sanitized(kind, options.variants, options.fuzz)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
