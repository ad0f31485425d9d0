"""The stages of the GPU check, in their order: the flagship first, so that a run that is cut short says the most."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from . import cases as C
from . import tools
from .cases import GpuCase
from .items import Item
from .results import StageResult
from .session import NO_TIME, ONE_THREAD, Session, cores
from .toolchain import gpu_state, other_ptxas
from .verdicts import AS_IT_IS, WITH_WGMMA, judge_variants


@dataclass(frozen=True)
class Stage:
    """`reserve` seconds are kept for it by those before it."""

    name: str
    reserve: float
    run: Callable[[Session, StageResult], None]
    on_cpu: bool = False


def machine(session: Session, stage: StageResult) -> None:
    """What the GPU is, and what it can do at most."""
    device, results = session.device, session.results
    results.states.append(gpu_state())
    session.run(stage, [Item("the GPU", ".times:describe", {"device": device}, limit=120)])
    results.machine = next((row for row in stage.rows if "torch" in row), {})
    items = [Item("copy", ".times:copy_ceiling", {"device": device})]
    for dtype in C.DTYPES:
        arguments = {"dtype": dtype, "device": device}
        items.append(Item(f"products in {dtype}", ".times:product_ceiling", arguments))
    session.run(stage, items)
    results.ceilings |= {row["ceiling"]: row["value"] for row in stage.rows if "ceiling" in row}


def precompile(session: Session, stage: StageResult) -> None:
    """All Triton kernels of the later stages, in as many processes as there are cores."""
    parts = cores()
    needed = [*C.in_dtypes(C.SMALL, ("bfloat16", "tf32")), *C.in_dtypes(C.CASES, C.DTYPES), *C.TIMED, *C.GRAPHS]
    needed += [replace(case, passes="training") for case in C.REPEATED]
    cases = [case.to_json() for case in dict.fromkeys(needed)]
    for backend in filter(C.uses_triton, session.results.backends):
        common = {"cases": cases, "backend": backend, "parts": parts, "device": session.device, "model": True}
        items = [
            Item(
                f"part {part + 1} of {parts} of {backend}'s kernels",
                ".precompile:compile_part",
                common | {"part": part},
                limit=150,
                fresh=True,
                environment=ONE_THREAD,
                required=False,  # what is not compiled in time is compiled when it is needed
            )
            for part in range(parts)
        ]
        session.run_together(stage, items)


def each(
    session: Session, function: str, cases: Iterable[GpuCase], what: str, seconds: float = 2, limit: float = 90
) -> list[Item]:
    """An item for each case and backend."""
    return [
        Item(
            f"{what} of {case}, {backend}",
            f".checks:{function}",
            {"case": case.to_json(), "backend": backend, "device": session.device},
            seconds,
            limit,
        )
        for case in cases
        for backend in session.results.backends
    ]


def flagship_accuracy(session: Session, stage: StageResult) -> None:
    cases = C.INTERPRETED if session.device == "cpu" else C.FLAGSHIP
    session.run(stage, each(session, "compare", C.in_dtypes(cases, ("bfloat16",)), "accuracy"))


def accuracy(session: Session, stage: StageResult) -> None:
    if session.device == "cpu":
        cases = C.in_dtypes(C.INTERPRETED[1:], ("float32",))  # eager PyTorch has tf32 on a GPU alone
    else:
        done = C.in_dtypes(C.FLAGSHIP, ("bfloat16",))
        cases = [case for case in C.in_dtypes(C.CASES, C.DTYPES) if case not in done]
    session.run(stage, each(session, "compare", cases, "accuracy"))


def miscompilation(session: Session, stage: StageResult) -> None:
    """The folded attention as it is, with and without Hopper's matrix instructions, and with another ptxas.

    With some releases of Triton and ptxas, products of these instructions with operands in registers are reported to go
    wrong (flash-linear-attention#640, triton#11781); the folded kernels have such products, and as they are go without
    these instructions where `msformer_kernels.triton.device` knows of a fault.
    """
    capability = session.results.machine.get("capability", "9.0")
    if capability != "9.0":
        stage.skip("folded attention", f"this GPU is of compute capability {capability}, Hopper of 9.0")
        return
    variants: list[tuple[str, dict[str, str]]] = [
        (AS_IT_IS, {}),
        (WITH_WGMMA, {}),
        ("DISABLE_MMA_V3=1", {"DISABLE_MMA_V3": "1"}),
    ]
    if other := other_ptxas():
        variants.append((f"ptxas {other[1]}", {"TRITON_PTXAS_PATH": other[0]}))
    else:
        stage.skip("with another ptxas", "there is none; TRITON_PTXAS_PATH may name one")
    items = []
    for name, environment in variants:
        for backend in filter(C.uses_triton, session.results.backends):
            arguments: dict[str, Any] = {"backend": backend, "device": session.device, "variant": name}
            arguments |= {"cases": [case.to_json() for case in C.FOLDED]}
            call = ".verdicts:compare_variant"
            label = f"folded attention, {name}, {backend}"
            items.append(Item(label, call, arguments, 30, 150, fresh=True, environment=environment))
    session.run_together(stage, items)
    stage.notes += judge_variants(stage.rows)


def repeatability(session: Session, stage: StageResult) -> None:
    cases = C.INTERPRETED[:1] if session.device == "cpu" else C.REPEATED
    session.run(stage, each(session, "repeat", cases, "repeated runs"))


def graphs(session: Session, stage: StageResult) -> None:
    session.run(stage, each(session, "graph", C.GRAPHS, "CUDA graph"))


def host_time(session: Session, stage: StageResult) -> None:
    items = []
    for operation in ("attention", "mix_ffn_skip", "block"):
        for backend in session.results.backends:
            arguments = {"operation": operation, "backend": backend, "device": session.device}
            items.append(Item(f"host time of {operation}, {backend}", ".times:host_time", arguments))
    session.run(stage, items)


@dataclass(frozen=True)
class Contender:
    """Who is timed: a backend of ours, or the plain form, compiled or not."""

    name: str
    backend: str | None = None
    compile_mode: str | None = None
    graphed: bool = False
    seconds: float = 3
    limit: float = 60

    def item(self, case: GpuCase, device: str) -> Item:
        arguments: dict[str, Any] = {"case": case.to_json(), "contender": self.name, "backend": self.backend}
        arguments |= {"compile_mode": self.compile_mode, "graphed": self.graphed, "device": device}
        return Item(
            f"time of {case}, {self.name}",
            ".times:measure",
            arguments,
            self.seconds,
            self.limit,
            fresh=self.compile_mode is not None,
            required=self.backend is not None,
        )


COMPILE = Contender("compile", compile_mode="default", seconds=25, limit=90)
MAX_AUTOTUNE = Contender("max-autotune", compile_mode="max-autotune", seconds=45, limit=120)


def contenders(backends: Sequence[str]) -> list[Contender]:
    """In the order in which they are timed; a compiler may not come to an end, so those are last."""
    ours = [c for b in backends for c in (Contender(b, b), Contender(f"{b}, graph", b, graphed=True))]
    return [*ours, Contender("eager"), COMPILE, MAX_AUTOTUNE]


def _not_yet(session: Session, items: Iterable[Item]) -> list[Item]:
    """Those that no stage has measured or tried."""
    stages = [session.results.stages[name] for name in TIME_STAGES if name in session.results.stages]
    done = {f"time of {row['case']}, {row['contender']}" for stage in stages for row in stage.rows}
    done |= {failure["what"] for stage in stages for failure in stage.failures}
    done |= {skip["what"] for stage in stages for skip in stage.skipped if skip["why"] != NO_TIME}
    return [item for item in items if item.name not in done]


def block_times(session: Session, stage: StageResult) -> None:
    """Everybody on one case before the next case."""
    chosen = contenders(session.results.backends)
    session.run(stage, [c.item(case, session.device) for case in C.BLOCK_ROWS for c in chosen])
    session.results.states.append(gpu_state())


def times(session: Session, stage: StageResult) -> None:
    """One contender on all cases before the next contender, so that all have times of ours and of eager."""
    chosen = contenders(session.results.backends)
    session.run(stage, _not_yet(session, [c.item(case, session.device) for c in chosen for case in C.TIMED]))
    session.results.states.append(gpu_state())


def fit(session: Session, stage: StageResult) -> None:
    items = []
    for backend in session.results.backends:
        common = {"backend": backend, "device": session.device}
        chosen = {"MSFORMER_BACKEND": backend}
        for dtype in ("float32", "tf32"):
            arguments = common | {"dtype": dtype}
            items.append(Item(f"fit in {dtype}, {backend}", ".fit:one", arguments, 12, 90, True, chosen))
        name = f"fits side by side, {backend}"
        items.append(Item(name, ".fit:several", common, 20, 120, True, chosen))
    session.run(stage, items)


STAGES = (
    Stage("machine", 15, machine),
    Stage("precompile", 60, precompile),
    Stage("accuracy-bf16", 15, flagship_accuracy, on_cpu=True),
    Stage("block-times", 60, block_times),
    Stage("accuracy", 40, accuracy, on_cpu=True),
    Stage("miscompilation", 35, miscompilation),
    Stage("repeatability", 8, repeatability, on_cpu=True),
    Stage("graphs", 8, graphs),
    Stage("host-time", 4, host_time),
    Stage("times", 50, times),
    Stage("memcheck", tools.MEMCHECK_SECONDS, tools.memcheck),
    Stage("ncu", tools.PROFILE_SECONDS, tools.profile),
    Stage("fit", 30, fit),
    Stage("late-times", 0, times),
)
"""The last one goes on with what `times` had no time for."""
TIME_STAGES = ("block-times", "times", "late-times")
PREFLIGHT = "preflight"
NAMES = (PREFLIGHT, *(stage.name for stage in STAGES))
