"""Which backend a call gets."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import msformer_kernels as kernels
from msformer_kernels.core import backends
from msformer_kernels.core.backends import cuda_library, resolve
from msformer_kernels.core.operator import OPERATORS
from msformer_kernels.core.reference import Reference
from tests.kernels.cases import (
    attention_case,
    batch_norm_case,
    cast,
    linear_case,
    mix_ffn_case,
    require,
    run,
    self_attention_case,
)


def test_order_of_choice(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.delenv("MSFORMER_BACKEND", raising=False)
    assert resolve(None, "cpu", torch.float32) == "native", "also where the interpreter would do"
    monkeypatch.setenv("MSFORMER_BACKEND", "reference")
    assert resolve(None, "cpu", torch.float32) == "reference"
    with kernels.use_backend(backend):
        assert resolve(None, "cpu", torch.float32) == backend
        with kernels.use_backend("reference"):
            assert resolve(None, "cpu", torch.float32) == "reference"
            assert resolve(backend, "cpu", torch.float32) == backend
        assert resolve(None, "cpu", torch.float32) == backend
    assert resolve(None, "cpu", torch.float32) == "reference"


def test_use_backend_is_undone_by_an_exception_and_stays_in_its_thread() -> None:
    seen = []

    def fail_inside() -> None:
        with kernels.use_backend("reference"):
            thread = threading.Thread(target=lambda: seen.append(getattr(backends._override, "name", None)))
            thread.start()
            thread.join()
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert seen == [None]
    assert getattr(backends._override, "name", None) is None


def test_explicit_choice_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    name, reason = "triton", "it serves GPU tensors"
    monkeypatch.setattr(backends, "_interpreted", False)
    q = torch.randn(1, 1, 3, 2)
    message = f"'{name}'.*backend=.*{reason}.*usable here: reference"
    with pytest.raises(kernels.BackendError, match=message):
        kernels.efficient_attention(q, q, q, backend=name)
    with pytest.raises(kernels.BackendError, match="use_backend"), kernels.use_backend(name):
        kernels.efficient_attention(q, q, q)
    monkeypatch.setenv("MSFORMER_BACKEND", name)
    with pytest.raises(kernels.BackendError, match="MSFORMER_BACKEND"):
        kernels.efficient_attention(q, q, q)


def test_unknown_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 1, 3, 2)
    with pytest.raises(ValueError, match="backend=: unknown backend 'tpu'; expected one of reference, native"):
        kernels.efficient_attention(q, q, q, backend="tpu")
    with pytest.raises(ValueError, match="use_backend: unknown"), kernels.use_backend("tpu"):
        pass
    monkeypatch.setenv("MSFORMER_BACKEND", "tpu")
    with pytest.raises(ValueError, match="MSFORMER_BACKEND: unknown"):
        resolve(None, "cpu", torch.float32)


def test_native_serves_the_cpu_only() -> None:
    with pytest.raises(kernels.BackendError, match="it serves CPU tensors, these are on cuda"):
        resolve("native", "cuda", torch.float32)
    assert "native" not in kernels.available_backends(torch.device("cuda", 0))


def test_triton_serves_the_gpu_where_the_cuda_kernels_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MSFORMER_BACKEND", raising=False)
    monkeypatch.setitem(backends._cuda_reasons, "cuda", "no nvcc")
    require("triton")
    assert kernels.explain(device="cuda:0", dtype=torch.bfloat16).chosen == "triton"
    assert resolve(None, "cuda", torch.float64) == "reference", "there are no kernels for it"
    with pytest.raises(kernels.BackendError, match=r"no kernels for torch\.float64"):
        resolve("triton", "cuda", torch.float64)
    monkeypatch.setattr(backends, "_interpreted", False)
    with pytest.raises(
        kernels.BackendError, match=r"these are on cpu \(its interpreter serves the CPU: TRITON_INTERPRET=1\)"
    ):
        resolve("triton", "cpu", torch.float32)
    monkeypatch.setattr(backends, "_triton_reason", "the package triton is not installed")
    assert resolve(None, "cuda", torch.float32) == "reference"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A GPU that is not there, which the CUDA kernels serve until a test takes something away from it."""
    found = SimpleNamespace(driver="", compiled=[80, 90], capability=(8, 6), seen=True, shared_memory=227 << 10)
    library = SimpleNamespace(
        is_emulated=lambda: False,
        why_not_this_driver=lambda: found.driver,
        compiled_for=lambda: found.compiled,
        shared_memory=lambda: found.shared_memory,
    )
    monkeypatch.delenv("MSFORMER_BACKEND", raising=False)
    monkeypatch.setitem(backends._cuda_reasons, "cuda", "")
    monkeypatch.setattr(backends, "cuda_library", lambda device_type: library)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found.seen)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: found.capability)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    backends._ask_gpu.cache_clear()
    yield found
    backends._ask_gpu.cache_clear()


def test_cuda_serves_the_gpu(gpu: SimpleNamespace) -> None:
    explanation = kernels.explain("cuda:0", torch.bfloat16, "mix_ffn")
    assert explanation.chosen == "cuda"
    assert explanation.reasons["cuda"] == "usable, not measured on a GPU yet"


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ({"driver": "CUDA 13.5 needs driver 580 or newer"}, "CUDA 13.5 needs driver 580 or newer"),
        ({"seen": False}, "PyTorch sees no GPU"),
        ({"capability": (7, 5)}, "it is compiled for compute capability 8.0 and newer, this GPU has 7.5"),
        ({"compiled": [90, 120]}, "it is compiled for compute capability 9.0 and newer, this GPU has 8.6"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_explain_says_what_the_cuda_kernels_lack(missing: dict[str, object], reason: str, gpu: SimpleNamespace) -> None:
    vars(gpu).update(missing)
    explanation = kernels.explain("cuda", torch.float16, "mix_ffn")
    assert explanation.chosen != "cuda"
    assert explanation.reasons["cuda"] == f"not usable: {reason}"


def test_each_gpu_of_a_machine_is_asked(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """One may be too old; another has too little shared memory for one operator alone, and the call goes elsewhere."""
    asked: list[int | None] = []

    @contextmanager
    def current(index: int | None) -> Iterator[None]:
        asked.append(index)
        yield

    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5) if index == 1 else (8, 6))
    gpu.shared_memory = 99 << 10

    def reason(index: int, operator: str, dtype: torch.dtype) -> str | None:
        x = SimpleNamespace(device=torch.device("cuda", index), dtype=dtype, shape=(1, 4, 8))
        taps = SimpleNamespace(shape=(8, 1, 3, 3))
        given = {"x": x, "inner_activation": "identity", "gated": False, "dw_weight": taps}
        given |= {"norm_kind": "layer", "memory_key": None, "memory_value": None}
        call = [given.get(n, SimpleNamespace(shape=(8, 8))) for n in OPERATORS[operator].names]
        return backends.why_not("cuda", "cuda", dtype, OPERATORS[operator], call)

    assert "this GPU has 7.5" in str(reason(1, "mix_ffn", torch.float32))
    assert reason(0, "mix_ffn", torch.float32) is None
    assert "this GPU has 99" in str(reason(0, "mix_ffn", torch.bfloat16))
    assert reason(0, "efficient_self_attention", torch.bfloat16) is None
    assert set(asked) == {0}


def test_explain_names_the_dtype_that_the_cuda_kernels_lack(gpu: SimpleNamespace) -> None:
    assert kernels.explain("cuda", torch.float64).reasons["cuda"] == "not usable: it has no kernels for torch.float64"


def test_explain_says_that_pytorch_is_for_amd(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    reason = kernels.explain("cuda", torch.float16).reasons["cuda"]
    assert reason == "not usable: it serves NVIDIA GPUs, this is PyTorch for AMD"


def test_explain_says_why_the_cuda_kernels_were_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first line of what the build left behind; the rest is in the file."""
    package = tmp_path / "msformer_kernels"
    (package / "core").mkdir(parents=True)
    (package / "_missing_error.txt").write_text("no nvcc, which compiles the CUDA kernels\nmore\n")
    monkeypatch.setattr(backends, "__file__", str(package / "core" / "backends.py"))
    monkeypatch.setitem(backends._cuda_reasons, "cuda", backends._why_no_extension("_missing"))
    reason = kernels.explain("cuda").reasons["cuda"]
    assert "msformer_kernels._missing is not available: no nvcc, which compiles the CUDA kernels (all of it: " in reason
    assert "more" not in reason


def test_cuda_serves_the_cpu_in_its_emulation_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    require("cuda")
    assert resolve("cuda", "cpu", torch.float32) == "cuda"
    assert cuda_library("cpu").is_emulated()
    assert cuda_library("cpu").compiled_for() == []
    assert cuda_library("cpu").why_not_this_driver() == ""
    monkeypatch.delitem(backends._cuda_reasons, "cpu")
    with pytest.raises(kernels.BackendError, match=r"these are on cpu \(its emulation serves the CPU: MSFORMER_CUDA"):
        resolve("cuda", "cpu", torch.float32)


def test_dtypes_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MSFORMER_BACKEND", raising=False)
    assert resolve(None, "cpu", torch.float8_e4m3fn) == "reference"
    with pytest.raises(kernels.BackendError, match="usable here: reference"):
        resolve("native", "cpu", torch.float8_e4m3fn)


def test_the_op_names_the_backends_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_triton_reason", "")  # as where it is installed
    q = torch.randn(1, 1, 3, 2)
    with pytest.raises(ValueError, match=r"unknown backend 'tpu'; expected one of reference, native, cuda, triton"):
        torch.ops.msformer.efficient_attention(q, q, q, None, None, None, 1.0, 1.0, 1.0, True, "softmax", 1e-15, "tpu")
    with pytest.raises(kernels.BackendError, match=r"'triton' .*it has no kernels for linear"):
        torch.ops.msformer.linear(q[0], torch.randn(3, 2), None, "triton")


@pytest.mark.parametrize("name", ["reference", "native"])
def test_an_op_without_a_backend_takes_that_of_the_machine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, as in a graph that was traced elsewhere; `use_backend` is for calls, not for ops."""
    require(name)
    monkeypatch.setenv("MSFORMER_BACKEND", name)
    x, weight = torch.randn(2, 5, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    seen = []
    for module in ("msformer_kernels.core.reference.Reference.forward", "msformer_kernels.ops.linear.native.forward"):
        owner, _, function = module.rpartition(".")
        target = import_module(owner) if owner.endswith("native") else Reference
        original = getattr(target, function)
        monkeypatch.setattr(target, function, lambda *a, m=module, o=original: (seen.append(m), o(*a))[1])
    OPERATORS["linear"]._checked.clear()
    with kernels.use_backend("triton"):
        output = torch.ops.msformer.linear(x, weight, None, None)
    assert len(seen) == 1
    assert name in seen[0]
    found = torch.autograd.grad(output.square().sum(), (x, weight))
    expected = torch.autograd.grad(torch.nn.functional.linear(x, weight).square().sum(), (x, weight))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("operator", list(OPERATORS))
def test_the_reference_as_an_op(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradients are those of the reference itself; what only other backends need is NaN, not a wrong value."""
    monkeypatch.setenv("MSFORMER_BACKEND", "reference")
    case = {
        "linear": linear_case("a"),
        "batch_norm": batch_norm_case("a"),
        "efficient_attention": attention_case("a", mask="random"),
        "efficient_self_attention": self_attention_case("a", heads=2),
        "mix_ffn": mix_ffn_case("a"),
    }[operator]
    tensors = cast(case.draw(), torch.float32)
    expected = run(case, tensors, "reference")
    monkeypatch.setattr(backends, "choose", lambda *_: None)
    found = run(case, tensors, "reference")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{n}: {m}")


def test_explain_tells_the_choice_and_the_reasons(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.delenv("MSFORMER_BACKEND", raising=False)
    explanation = kernels.explain()
    assert explanation.chosen == "native"
    assert explanation.rule == "the fastest for the device"
    text = str(explanation)
    assert "* native" in text
    assert "instruction set" in text
    monkeypatch.setitem(backends._cuda_reasons, "cuda", "no nvcc")
    monkeypatch.setattr(backends, "_triton_reason", "")  # as where it is installed
    assert kernels.explain("cuda").exceptions["linear"] == "reference (triton: it has no kernels for linear)"
    with pytest.raises(ValueError, match=r"operator: expected one of .*, got 'softmax'"):
        kernels.explain(operator="softmax")
    monkeypatch.setenv("MSFORMER_BACKEND", "reference")
    assert str(kernels.explain()).startswith("cpu, float32: reference (chosen by MSFORMER_BACKEND)")
    monkeypatch.setenv("MSFORMER_BACKEND", "triton")
    monkeypatch.setattr(backends, "_interpreted", False)
    refused = kernels.explain()
    assert refused.chosen is None
    assert "cpu, float32: None (backend 'triton' (chosen by MSFORMER_BACKEND) is not available" in str(refused)
    assert kernels.explain(operator="linear").rule == "triton, chosen by MSFORMER_BACKEND, has no kernels for it"


def test_without_the_extension_one_warning_and_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MSFORMER_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_native_reason", "no C++ compiler")
    monkeypatch.setattr(backends, "_warned", threading.Event())
    q = torch.randn(1, 1, 3, 2)
    with pytest.warns(RuntimeWarning, match="no C\\+\\+ compiler"):
        kernels.efficient_attention(q, q, q)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels.efficient_attention(q, q, q)
    with pytest.raises(kernels.BackendError, match="no C\\+\\+ compiler"):
        kernels.efficient_attention(q, q, q, backend="native")


def _run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_instruction_set_from_the_environment() -> None:
    require("native")
    code = "import msformer_kernels; from msformer_kernels import _native; print(_native.isa())"
    assert _run(code, MSFORMER_CPU_ISA="plain").stdout.strip() == "plain"
    failed = _run(code, MSFORMER_CPU_ISA="mmx")
    assert failed.returncode != 0
    assert "unknown or unsupported instruction set 'mmx'; this machine has: " in failed.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_extension_shares_the_openmp_of_torch() -> None:
    """Two OpenMP runtimes in one process would fight over the cores and ignore torch.set_num_threads."""
    require("native")
    code = (
        "import os, torch, msformer_kernels as kernels\n"
        "from msformer_kernels import _native\n"
        "torch.set_num_threads(1)\n"
        "x, weight = torch.ones(1, 4000, 64), torch.ones(64, 64)\n"
        "torch.set_num_threads(3)\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "kernels.linear(x, weight, backend='native')\n"
        "started = len(os.listdir('/proc/self/task')) - before\n"
        "lines = [line.strip() for line in open('/proc/self/maps')]\n"
        "names = ('libgomp', 'libomp', 'libiomp')\n"
        "runtimes = {line.split(' ')[-1] for line in lines if any(name in line for name in names)}\n"
        "print(started, len(runtimes), os.path.realpath(_native.thread_library()) in runtimes)"
    )
    assert _run(code).stdout.split() == ["2", "1", "True"]


def test_a_call_that_a_backend_cannot_serve_is_refused_and_goes_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    require("native")
    require("triton")
    monkeypatch.delenv("MSFORMER_BACKEND", raising=False)

    def too_wide(call: Any) -> str | None:
        return f"width is {call.width}, its kernels take at most 8" if call.width > 8 else None

    monkeypatch.setattr(OPERATORS["mix_ffn"], "limits", {"triton": too_wide})
    one, tap = torch.ones(1, 1), torch.ones(1, 1, 3, 3)
    arguments = (torch.randn(1, 9, 1), 1, 9, one, None, tap, None, one, None)
    with pytest.raises(kernels.BackendError, match=r"width is 9, its kernels take at most 8; usable here"):
        kernels.mix_ffn(*arguments, backend="triton")
    explanation = kernels.mix_ffn.explain(*arguments)  # type: ignore[attr-defined]
    assert "not usable: width is 9" in explanation.reasons["triton"]
    assert explanation.chosen == "native"
