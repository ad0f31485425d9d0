"""``msformer doctor``: what it finds, and what it says of it."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
import torch
from torch import Tensor

import msformer_kernels as kernels
from msformer.doctor import facts, selftest
from msformer.doctor.advice import advice
from msformer.doctor.facts import Backend, Extra, Facts
from msformer.doctor.selftest import Probe, Verdict, probes, self_test
from msformer_kernels.core.operator import OPERATORS
from tests.msformer.commands.events import events, of_kind
from tests.msformer.test_cli import run

WELL = Facts(
    versions={"msformer": "1.0", "torch": "2.13.0", "python": "3.11.7"},
    extras=[Extra("medical", [])],
    machine={"system": "Linux", "processor": "one"},
    cores=4,
    threads=4,
    variants=["avx512", "avx2", "plain"],
    no_tiles="",
    thread_library="libgomp.so.1",
    gpus=[],
    no_gpu="this build of PyTorch is for CPUs alone",
    backends={"cpu": {"linear": Backend("native", "the fastest for the device")}},
    unused={"cpu": {"cuda": "it serves GPU tensors"}},
    environment={},
)
RIGHT = Verdict("linear", "cpu", "float32", "native", 1e-7, 1e-7, 1.0, 2.0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "SECONDS", 0.0)
    monkeypatch.setattr(selftest, "SMALL", (5, 4, 8))
    monkeypatch.setattr(selftest, "LARGE", (6, 5, 8))


@pytest.mark.usefixtures("quick")
def test_all_is_well() -> None:
    result = run("doctor", "--json")
    assert result.exit_code == 0, result.output
    told = events(result)
    tests = of_kind(told, "test")
    assert {each["operator"] for each in tests} == set(OPERATORS), "a probe of every operator"
    assert {each["dtype"] for each in tests} == {"float32", "bfloat16"}
    assert all(each["error"] < 0.05 and each["problem"] == "" for each in tests)
    assert all((each["milliseconds"] is None) == (each["dtype"] == "bfloat16") for each in tests)
    assert told[-1]["counts"] == {"tests": 2 * len(OPERATORS), "failed": 0}
    found = told[0]
    assert found["versions"]["torch"] == torch.__version__
    assert found["backends"]["cpu"]["mix_ffn"]["name"] == kernels.explain("cpu", operator="mix_ffn").chosen
    for word in ("versions", "processor", "GPU", "on cpu", "efficient_self_attention", "Self-test"):
        assert word in result.stderr
    table = result.stderr.partition("Self-test")[2].splitlines()[: 2 + 2 * len(OPERATORS)]  # advice may be longer
    assert max(map(len, table)) <= 80


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("wrong", ["values", "error"])
def test_a_kernel_that_is_wrong_fails_the_self_test(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Probe.run

    def broken(self: Probe, backend: str | None) -> list[Tensor]:
        if self.operator != "linear" or backend is not None:
            return plain(self, backend)
        if wrong == "error":
            raise RuntimeError("illegal instruction")
        results = plain(self, backend)
        results[1][..., 0] = float("nan")
        return results

    monkeypatch.setattr(Probe, "run", broken)
    result = run("doctor", "--quiet")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.count("failed: linear, cpu, ") == 2
    assert ("result 1 has the error nan" if wrong == "values" else "RuntimeError: illegal instruction") in result.stderr


def test_the_rule_of_errors() -> None:
    """A sixteenth of bfloat16's precision lost is seen, a rounding is not."""
    probe = probes(5, 4, 8)[3].to("cpu", torch.float32)
    assert selftest._errors(probe, torch.float32)[2] == ""

    class Rough(Probe):
        def run(self, backend: str | None) -> list[Tensor]:
            found = super().run(backend)
            return [each * (1 + 1e-5) for each in found] if backend is None else found

    rough = Rough(probe.operator, probe.tensors, probe.options)
    assert "result 0 has the error 1.0e-05" in selftest._errors(rough, torch.float32)[2]


def test_info_is_the_same_without_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSFORMER_BACKEND", "reference")
    result = run("info")
    assert result.exit_code == 0
    assert "environment   MSFORMER_BACKEND=reference" in result.output
    assert "on cpu        reference (chosen by MSFORMER_BACKEND)" in result.output
    assert "Self-test" not in result.output


def test_extras_that_lack_something(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = facts.version

    def version(name: str) -> str:
        if name == "nibabel":
            raise PackageNotFoundError(name)
        return "2.0" if name == "pydicom" else plain(name)

    monkeypatch.setattr(facts, "version", version)
    found = {extra.name: extra for extra in facts.extras()}
    assert not facts.FOR_DEVELOPERS & found.keys()
    assert found["medical"].missing[:2] == ["nibabel", "pydicom>=3 (here is 2.0)"]
    assert found["medical"].command == "pip install 'msformer[medical]'"
    assert found["train"].missing == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        (
            {"unused": {"cpu": {"native": "no compiler"}}, "variants": []},
            "kernels are not used: no compiler. With",
        ),
        ({"variants": ["plain"]}, "none of the instructions"),
        ({"thread_library": ""}, "no OpenMP runtime"),
        ({"threads": 1}, "One thread of 4 cores is used, as torch.get_num_threads() is 1; set OMP_NUM_THREADS=4"),
        ({"threads": 1, "environment": {"OMP_NUM_THREADS": "1"}}, "as OMP_NUM_THREADS is 1"),
        ({"threads": 8}, "8 threads share 4 cores"),
        ({"environment": {"MSFORMER_BACKEND": "native"}}, "MSFORMER_BACKEND=native decides"),
        (
            {"extras": [Extra("medical", ["nibabel"]), Extra("segment", []), Extra("hub", ["huggingface-hub"])]},
            "not complete: [medical], [hub]. Where you need one, run, for example: pip install 'msformer[medical]'",
        ),
        ({"extras": []}, "not installed but runs from its source folder"),
        (
            {"gpus": ["H200"], "unused": {"cpu": {}, "cuda": {"triton": "no triton"}}},
            "triton is not used on the",
        ),
    ],
)
def test_advice(change: dict[str, Any], said: str | None) -> None:
    found = list(advice(replace(WELL, **change), [RIGHT]))
    assert (found == []) if said is None else (len(found) == 1 and said in found[0])


def test_advice_on_the_self_test() -> None:
    slow, reference = replace(RIGHT, milliseconds=4.0), replace(RIGHT, milliseconds=4.0, backend="reference")
    assert "linear on cpu takes longer than in eager PyTorch (4.0 and 2.0 ms)" in next(advice(WELL, [slow]))
    assert list(advice(WELL, [reference])) == []
    assert "MSFORMER_BACKEND=reference computes" in next(advice(WELL, [replace(RIGHT, problem="NaN")]))


@pytest.mark.usefixtures("quick")
def test_probes_reach_the_backend_that_is_explained() -> None:
    assert all(each.backend == kernels.explain("cpu", operator=each.operator).chosen for each in self_test(["cpu"]))
