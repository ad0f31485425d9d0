"""What a user can do to make it work, or faster: a sentence each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msformer.doctor.facts import Facts
from msformer.doctor.selftest import Verdict

SLOWER = 1.5
"""Times the time of eager PyTorch, from which on a backend is worth a word."""


def advice(facts: Facts, verdicts: Sequence[Verdict] = ()) -> Iterator[str]:
    """On what was found; nothing where all is well."""
    if "native" in facts.unused.get("cpu", {}):
        yield (
            f"The CPU kernels are not used: {facts.unused['cpu']['native']}. With a C++17 compiler, run: pip install "
            "--force-reinstall --no-deps --no-cache-dir msformer"
        )
    elif facts.variants and facts.variants[0] == "plain":
        yield "This processor has none of the instructions that the CPU kernels are fast with; they run as plain C++."
    if facts.variants and not facts.thread_library:
        yield "The CPU kernels run on one thread, as the process has no OpenMP runtime, which PyTorch brings along."
    if facts.gpus:
        for name in ("cuda", "triton"):
            if reason := facts.unused["cuda"].get(name):
                yield f"The backend {name} is not used on the GPU: {reason}."
    if facts.threads == 1 and facts.cores > 1:
        limit = facts.environment.get("OMP_NUM_THREADS")
        why = f"OMP_NUM_THREADS is {limit}" if limit else "torch.get_num_threads() is 1"
        yield f"One thread of {facts.cores} cores is used, as {why}; set OMP_NUM_THREADS={facts.cores}, or unset it."
    elif facts.threads > facts.cores:
        yield (
            f"{facts.threads} threads share {facts.cores} cores, which is slower than as many threads as cores; set "
            f"OMP_NUM_THREADS={facts.cores}."
        )
    if chosen := facts.environment.get("MSFORMER_BACKEND"):
        yield f"MSFORMER_BACKEND={chosen} decides the backend; unset it to get the fastest for each call."
    if missing := [extra for extra in facts.extras if extra.missing]:
        names = ", ".join(f"[{extra.name}]" for extra in missing)
        yield f"Extras that are not complete: {names}. Where you need one, run, for example: {missing[0].command}"
    if not facts.extras:
        yield "msformer is not installed but runs from its source folder; pip install . says which packages it needs."
    if facts.versions["msformer"].startswith("0+"):
        yield "The version is not known, as the package is not installed."
    for verdict in verdicts:
        if verdict.problem:
            yield (
                f"{verdict.operator} on {verdict.device} in {verdict.dtype} fails: {verdict.problem}. Until that is "
                "solved, MSFORMER_BACKEND=reference computes with plain PyTorch."
            )
        elif _is_slow(verdict):
            yield (
                f"{verdict.operator} on {verdict.device} takes longer than in eager PyTorch "
                f"({verdict.milliseconds:.1f} and {verdict.eager_milliseconds:.1f} ms); other programs may take the "
                "cores, so run it once more when they are idle."
            )


def _is_slow(verdict: Verdict) -> bool:
    times = verdict.milliseconds, verdict.eager_milliseconds
    if verdict.backend == "reference" or times[0] is None or times[1] is None:
        return False
    return times[0] > SLOWER * times[1]
