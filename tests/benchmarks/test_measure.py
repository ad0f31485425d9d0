"""Checking, taking turns, and memory."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.cases import Case, Shape
from benchmarks.machine import Ceilings, OtherPrograms, describe, limited_memory, measure_ceilings, peak_memory
from benchmarks.measure import Settings, calls_a_sample, deviation, in_turn, measure_case
from benchmarks.rows import FAILED, MEASURED, WRONG, Row
from benchmarks.workloads import Candidate

CASE = Case("attention", Shape(1, 2, 2, 4), "float32", "forward")
CEILINGS = Ceilings(1e9, "", 1e9, "")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class Fake(Candidate):
    """A rival that gives a fixed result and writes down when it is run."""

    mode = "fake"
    now = 0.0
    """What the clock shows."""

    def __init__(self, name: str, log: list[str], value: float = 1.0, fails_at: int = 10**9) -> None:
        self.name, self.log, self.value, self.fails_at = name, log, value, fails_at

    def run(self) -> None:
        self.log.append(self.name)
        if self.log.count(self.name) >= self.fails_at:
            raise RuntimeError("out of order\nand more")
        Fake.now += 6e-3  # long enough for one call a sample

    def clear(self) -> None:
        pass

    def results(self) -> dict[str, Tensor]:
        return {"output": torch.tensor([self.value, 0.5])}


@pytest.fixture(autouse=True)
def clock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test measures time: running a `Fake` moves the clock."""
    if "machine" not in request.node.name:
        monkeypatch.setattr("benchmarks.workloads.time.perf_counter", lambda: Fake.now)


def measure(log: list[str], rounds: int = 3, **fakes: Fake) -> dict[str, Row]:
    made = {"exact": Fake("exact", log)} | fakes
    rows = measure_case(
        CASE,
        list(fakes),
        Settings(rounds),
        CEILINGS,
        flush=lambda: log.append("flush"),
        report=lambda what: None,
        make=lambda case, rival: made[rival],
    )
    return {row.rival: row for row in rows}


def test_rivals_take_turns_with_a_flush_before_each_sample() -> None:
    log: list[str] = []
    rows = measure(log, a=Fake("a", log), b=Fake("b", log), c=Fake("c", log))
    check_and_warm_up = ["exact", *"abc", *"abc"]
    assert log[: len(check_and_warm_up)] == check_and_warm_up
    rounds = [name for round_ in ("abc", "bca", "cab") for rival in round_ for name in ("flush", rival)]
    assert log[len(check_and_warm_up) :] == [*rounds, *"abc"]  # the last ones are for the memory
    for row in rows.values():
        assert row.status == MEASURED
        assert len(row.samples) == 3
        assert row.seconds == pytest.approx(6e-3)
        assert row.error == 0
        assert row.share_of_ceiling == pytest.approx(CASE.work().seconds(1e9, 1e9) / row.seconds)


@pytest.mark.parametrize("value", [1.01, float("nan"), float("inf")])
def test_a_wrong_rival_is_named_and_not_timed(value: float) -> None:
    log: list[str] = []
    rows = measure(log, good=Fake("good", log), bad=Fake("bad", log, value))
    assert log.count("bad") == 1
    assert rows["bad"].status == WRONG
    assert rows["bad"].seconds is None
    assert rows["bad"].reason.startswith("output is off by")
    assert rows["good"].status == MEASURED


@pytest.mark.parametrize("run", [1, 2, 4])
def test_a_rival_that_fails_is_reported_with_the_reason(run: int) -> None:
    """In the check, in the warm-up, or in a later round."""
    log: list[str] = []
    rows = measure(log, good=Fake("good", log), bad=Fake("bad", log, fails_at=run))
    assert (rows["bad"].status, rows["bad"].reason) == (FAILED, "RuntimeError: out of order")
    assert rows["bad"].samples == []
    assert rows["bad"].peak_memory is None
    assert len(rows["good"].samples) == 3


def test_without_an_exact_result_nothing_is_timed() -> None:
    log: list[str] = []

    def make(case: Case, rival: str) -> Fake:
        if rival.endswith("exact"):
            raise MemoryError("too large")
        return Fake(rival, log)

    rows = measure_case(CASE, ["a"], Settings(1), CEILINGS, lambda: None, lambda what: None, make)
    assert rows[0].status == FAILED
    assert "MemoryError: too large" in rows[0].reason
    assert log == []


def test_short_calls_are_repeated() -> None:
    assert calls_a_sample(0.3) == 1
    assert calls_a_sample(1e-3) == 5
    assert calls_a_sample(0) == 1000
    assert in_turn(["a", "b", "c"], 4) == ["b", "c", "a"]


def test_small_gradients_are_measured_against_the_largest() -> None:
    exact = {"output": torch.tensor([2.0]), "grad.a": torch.tensor([100.0]), "grad.b": torch.tensor([1e-12])}
    rounding = exact | {"grad.b": torch.tensor([1e-5])}
    found = deviation(rounding, exact, "float32 highest", joined=False)
    assert found.is_right
    assert (found.error, found.where) == (pytest.approx(1e-5), "grad.b")
    assert not deviation(exact | {"grad.b": torch.tensor([0.1])}, exact, "float32 highest", joined=False).is_right
    off = deviation(exact | {"output": torch.tensor([2.1])}, exact, "float32 highest", joined=False)
    assert off.error == pytest.approx(0.05)
    joined = deviation(exact | {"grad.a": torch.tensor([70.0])}, exact, "bfloat16", joined=True)
    assert (joined.where, joined.error, joined.is_right) == ("parameter gradients", pytest.approx(0.3), False)


def test_every_rival_runs_under_the_precision_of_its_case() -> None:
    seen = []

    class Asking(Fake):
        def run(self) -> None:
            super().run()
            seen.append(torch.get_float32_matmul_precision())

    def make(case: Case, rival: str) -> Asking:
        seen.append(torch.get_float32_matmul_precision())
        return Asking(rival, [])

    case = replace(CASE, precision="medium")
    measure_case(case, ["a", "b"], Settings(1), CEILINGS, lambda: None, lambda what: None, make)
    assert set(seen) == {"medium"}
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("kind", "rival", "rate"),
    [
        ("float32 highest", "native (amx)", 2.0),
        ("float32 high", "native (amx)", 8.0),
        ("float32 medium", "native (amx)", 24.0),
        ("bfloat16", "native (amx)", 24.0),
        ("bfloat16", "native (avx512_bf16)", 4.0),
        ("float32 high", "native (avx512_bf16)", 2.0),
        ("float32 medium", "native (avx2)", 2.0),
        ("float32 high", "compile", 2.0),
        ("bfloat16", "compile", 24.0),
    ],
)
def test_the_ceiling_is_that_of_what_does_the_products(kind: str, rival: str, rate: float) -> None:
    assert Ceilings(2.0, "", 1.0, "", 4.0, 24.0).flop_rate(kind, rival) == rate
    assert Ceilings(2.0, "", 1.0, "").flop_rate(kind, rival) == 2.0


def test_missing_results_are_an_error() -> None:
    exact = {"output": torch.ones(2), "context": torch.ones(2)}
    with pytest.raises(ValueError, match="expected output, context, got output"):
        deviation({"output": torch.ones(2)}, exact, "float32 highest", joined=False)
    with pytest.raises(ValueError, match=r"context: expected shape \(2,\), got \(3,\)"):
        deviation(exact | {"context": torch.ones(3)}, exact, "float32 highest", joined=False)


@LINUX
def test_peak_memory_counts_what_is_freed_again() -> None:
    found = peak_memory(lambda: torch.ones(16 * 2**20))
    assert found is not None  # the kernel counts pages roughly
    assert 60 * 2**20 <= found < 80 * 2**20
    again = peak_memory(lambda: torch.ones(2**20))  # the first peak is forgotten
    assert again is not None
    assert 3 * 2**20 <= again < 16 * 2**20


@LINUX
def test_too_much_memory_is_an_error_and_the_limit_goes_away() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    with limited_memory(), pytest.raises(RuntimeError, match="memory"):
        torch.empty(2**45)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_the_machine_is_described_and_measured() -> None:
    machine = describe()
    assert machine.processor
    assert machine.threads == torch.get_num_threads()
    assert "reference" in machine.backends
    ceilings = measure_ceilings(attempts=1, size=2**22, steps=10_000)
    assert 1e8 < ceilings.flop_per_second < 1e16
    assert 1e8 < ceilings.bytes_per_second < 1e14


def test_other_programs_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"seconds": 0.0, "busy": 0.0, "own": 0.0}
    monkeypatch.setattr("benchmarks.machine.time.perf_counter", lambda: clock["seconds"])
    monkeypatch.setattr("benchmarks.machine._own_seconds", lambda: clock["own"])
    monkeypatch.setattr("benchmarks.machine._busy_seconds", lambda: clock["busy"])
    others = OtherPrograms()
    clock.update(seconds=0.1, busy=0.1)
    assert others.cores() is None
    clock.update(seconds=2.0, busy=4.0, own=3.0)
    assert others.cores() == pytest.approx(0.5)
