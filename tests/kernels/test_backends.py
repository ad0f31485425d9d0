"""Which backend a call gets."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch

import msformer_kernels as kernels
from msformer_kernels.core import backends
from msformer_kernels.core.backends import resolve
from tests.kernels.cases import require


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


@pytest.mark.parametrize(
    ("name", "reason"), [("triton", "it serves GPU tensors"), ("cuda", "not part of this version")]
)
def test_explicit_choice_never_falls_back(name: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_triton_serves_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MSFORMER_BACKEND", raising=False)
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


def test_dtypes_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MSFORMER_BACKEND", raising=False)
    assert resolve(None, "cpu", torch.float8_e4m3fn) == "reference"
    with pytest.raises(kernels.BackendError, match="usable here: reference"):
        resolve("native", "cpu", torch.float8_e4m3fn)


def test_the_op_names_the_backends_that_it_has() -> None:
    q = torch.randn(1, 1, 3, 2)
    with pytest.raises(ValueError, match=r"backend: msformer_kernels\.efficient_attention has no kernels for 'cuda'"):
        torch.ops.msformer.efficient_attention(q, q, q, None, 1.0, 1.0, 1.0, True, "softmax", "cuda")


def test_explain_tells_the_choice_and_the_reasons(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.delenv("MSFORMER_BACKEND", raising=False)
    explanation = kernels.explain()
    assert explanation.chosen == "native"
    assert explanation.rule == "the fastest for the device"
    text = str(explanation)
    assert "* native" in text
    assert "instruction set" in text
    assert "cuda       not usable" in text
    monkeypatch.setenv("MSFORMER_BACKEND", "reference")
    assert str(kernels.explain()).startswith("cpu, float32: reference (chosen by MSFORMER_BACKEND)")
    monkeypatch.setenv("MSFORMER_BACKEND", "cuda")
    refused = kernels.explain()
    assert refused.chosen is None
    assert "cpu, float32: None (backend 'cuda' (chosen by MSFORMER_BACKEND) cannot be had" in str(refused)


def test_without_the_extension_one_warning_and_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MSFORMER_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_native_imported", False)
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


def test_instruction_set_from_the_environment(backend: str) -> None:
    code = "import msformer_kernels; from msformer_kernels import _native; print(_native.isa())"
    assert _run(code, MSFORMER_CPU_ISA="plain").stdout.strip() == "plain"
    failed = _run(code, MSFORMER_CPU_ISA="mmx")
    assert failed.returncode != 0
    assert "unknown or unsupported instruction set 'mmx'; this machine has: " in failed.stderr


def test_extension_shares_the_openmp_of_torch(backend: str) -> None:
    """Two OpenMP runtimes in one process would fight over the cores and ignore torch.set_num_threads."""
    code = (
        "import torch, msformer_kernels\n"
        "lines = [line.strip() for line in open('/proc/self/maps')]\n"
        "print(len({line.split('/')[-1] for line in lines if 'libgomp' in line or 'libomp' in line}))"
    )
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    assert int(_run(code).stdout) <= 1
