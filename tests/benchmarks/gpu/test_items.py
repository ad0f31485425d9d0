"""The functions that items name, on a GPU that is only pretended, with Triton's interpreter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.cases import parse_shape
from benchmarks.gpu import checks, fit, precompile, times, verdicts
from benchmarks.gpu.cases import GpuCase, gpu_backends, uses_triton
from benchmarks.gpu.items import Skip
from benchmarks.gpu.worker import answer
from tests.benchmarks.gpu.fakes import pretend_gpu
from tests.kernels.cases import require

OPERATIONS = ("attention", "mix_ffn_skip", "block")


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    require("triton")
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(times, "FLUSHED", 1 << 10)
    monkeypatch.setattr(times, "LEAST_RUNS", 2)
    monkeypatch.setattr(times, "MOST_RUNS", 2)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def case(operation: str = "attention", dtype: str = "float32", **more: Any) -> dict[str, Any]:
    return GpuCase(operation, parse_shape("1x2x5x12"), dtype, "training", **more).to_json()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_times_of_a_rival(operation: str) -> None:
    row = times.measure(case(operation), "eager", None, None, False, "cpu")
    assert 0 < row["low"] <= row["ms"] <= row["high"]
    assert row["backend"] == ""
    assert row["flop"] > 0
    assert row["bytes"] > 0


@pytest.mark.parametrize("operation", OPERATIONS)
def test_rivals_compute_what_ours_compute(operation: str) -> None:
    """So that times of the same thing are compared."""
    what = GpuCase.from_json(case(operation))
    ours, plain = (times.training_step(what, backend, None, "cpu")() for backend in ("reference", None))
    pairs = [(a, b) for a, b in zip(ours, plain, strict=True) if a is not None and b is not None]
    assert len(pairs) > 4
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_times_of_ours_as_a_graph_and_by_calls() -> None:
    for name, graphed in (("triton", False), ("triton, graph", True)):
        row = times.measure(case(), name, "triton", None, graphed, "cpu")
        assert row["contender"] == name
        assert row["backend"] == "triton"


def test_compiled_rivals_are_compiled_in_their_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    modes, steps = [], []
    monkeypatch.setattr(torch, "compile", lambda f, mode: modes.append(mode) or f)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: steps.append(1))
    times.measure(case(), "compile", None, "default", False, "cpu")
    assert not steps
    times.measure(case(), "max-autotune", None, "max-autotune", False, "cpu")
    assert modes == ["default", "max-autotune"]
    assert steps


def test_ceilings_host_time_and_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(times, "sample_ms", lambda run, device: [run() is None or 2.0])
    monkeypatch.setattr(torch, "randn", lambda *shape, device=None, **_: torch.ones(16, 16))
    row = times.product_ceiling("bfloat16", "cpu")
    assert row["value"] == pytest.approx(2 * 8192**3 / 2 / 1e9)
    assert times.copy_ceiling("cpu")["unit"] == "GB/s"


def test_host_time_and_profile() -> None:
    calls = times.HOST_CALLS
    times.HOST_CALLS = 2
    try:
        assert times.host_time("attention", "triton", "cpu")["us"] > 0
    finally:
        times.HOST_CALLS = calls
    assert times.profiled(case(), "triton", "cpu")["bytes"] > 0


def test_a_graph_that_replays_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not checks.graph(case(), "triton", "cpu")["ok"]

    def working(run: Any) -> Any:
        found = run()

        def replay() -> None:
            for old, new in zip(found, run(), strict=True):
                old.copy_(new)

        return SimpleNamespace(replay=replay), found

    monkeypatch.setattr(checks, "captured", working)
    row = checks.graph(case(), "triton", "cpu")
    assert row["ok"], row


def test_other_bits_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.repeat(case(), "triton", "cpu", more=1)["ok"]
    real, count = checks.outputs_and_gradients, []

    def drifting(*arguments: Any) -> dict[str, torch.Tensor]:
        found = real(*arguments)
        count.append(1)
        found["output 0"] = found["output 0"] + 1e-7 * (len(count) == 2)
        return found

    monkeypatch.setattr(checks, "outputs_and_gradients", drifting)
    row = checks.repeat(case(), "triton", "cpu", more=1)
    assert not row["ok"]
    assert row["differ"] == ["output 0"]


def test_a_wrong_kernel_breaks_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    real = checks.outputs_and_gradients

    def off(case: Any, dtype: torch.dtype, x: torch.Tensor, backend: str, *more: Any) -> dict[str, torch.Tensor]:
        found = real(case, dtype, x, backend, *more)
        if backend == "triton":
            found["output 0"] = found["output 0"] * 1.001
        return found

    assert checks.compare(case(), "triton", "cpu")["ok"]
    monkeypatch.setattr(checks, "outputs_and_gradients", off)
    row = checks.compare(case(), "triton", "cpu")
    assert not row["ok"]
    assert any("output 0" in fault for fault in row["faults"])
    assert row["errors"]["output 0"] > 1.25


def test_a_variant_says_how_it_was_compiled() -> None:
    (row,) = verdicts.compare_variant([case()], "triton", "cpu", "as it is")
    assert (row["variant"], row["architecture"], row["ok"]) == ("as it is", "sm_90", True)
    assert row["ptxas"]
    assert row["tuned as"] == "cpu"


def test_the_guard_of_hopper_is_off_in_one_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    from msformer_kernels.triton import device

    monkeypatch.setattr(device, "wgmma_is_safe", device.wgmma_is_safe)
    assert device.family("cuda", 90, (12, 8)) == device.MMA_SYNC
    verdicts.compare_variant([case()], "triton", "cpu", verdicts.WITH_WGMMA)
    assert device.family("cuda", 90, (12, 8)) == "sm_90"


def test_results_that_are_not_finite_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(row["ok"] for row in checks.run_all([case(), case(masked=True)], "triton", "cpu"))
    bad = {"grad x": torch.tensor([float("nan")])}
    monkeypatch.setattr(checks, "outputs_and_gradients", lambda *_: bad)
    (row,) = checks.run_all([case()], "triton", "cpu")
    assert (row["ok"], row["not finite"]) == (False, ["grad x"])


def test_what_a_backend_does_not_serve_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    from msformer_kernels.core.operator import OPERATORS

    for name in ("mix_ffn", "efficient_self_attention"):
        monkeypatch.setattr(OPERATORS[name], "served_by", ("native",))
        reply = answer(
            {
                "call": ".checks:compare",
                "arguments": {"case": case("mix_ffn_skip"), "backend": "triton", "device": "cpu"},
            }
        )
        assert reply == {"skipped": "triton has no kernels for mix_ffn"}
        if name == "mix_ffn":
            assert GpuCase.from_json(case("block")).check_backend("triton") == ["mix_ffn"]
    with pytest.raises(Skip, match="efficient_self_attention and mix_ffn"):
        GpuCase.from_json(case("block")).check_backend("triton")


def test_a_dtype_that_a_backend_does_not_serve_is_skipped() -> None:
    with pytest.raises(Skip, match="native"):
        checks.outputs_and_gradients(
            GpuCase.from_json(case()), torch.float32, torch.ones(1, 10, 12, device="meta"), "native", 0
        )


def test_the_backends_are_those_of_msformer_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    import msformer_kernels

    names = ("reference", "native", "cuda", "triton")
    monkeypatch.setattr(msformer_kernels, "available_backends", lambda device: names)
    assert gpu_backends("cuda") == ["cuda", "triton"]
    assert uses_triton("triton")
    assert not uses_triton("native")


def test_signatures_tell_specialisations_apart() -> None:
    x = torch.zeros(64)

    def sign(*arguments: Any, **options: Any) -> str:
        return precompile.signature("kernel", arguments, options)

    assert sign(x, 33, BN=16) == sign(torch.ones(8), 35, BN=16)
    different = [sign(x, 1), sign(x, 32), sign(x, 33), sign(x[1:], 33), sign(x.bfloat16(), 33), sign(x, 33, BN=32)]
    assert len(set(different)) == len(different)


def test_fits_one_and_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "SIDE", 33)
    monkeypatch.setattr(fit, "STEPS", 1)
    monkeypatch.setattr(fit, "IMAGES", 2)
    monkeypatch.setenv("MSFORMER_BACKEND", "reference")
    assert fit.one("float32", "reference", "cpu")["steps"] == 1
    rows = fit.several("reference", "cpu")
    assert [(row["at once"], row["ok"]) for row in rows] == [(1, True), (4, True)]


def test_fits_need_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "find_spec", lambda name: None)
    with pytest.raises(Skip, match="pip install numpy"):
        fit.one("float32", "triton", "cpu")
