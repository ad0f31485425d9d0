"""Which backends are here, which one a call gets, and why.

A backend is one implementation of the operators:

- ``reference``: plain PyTorch, any device and dtype, differentiable any number of times; the specification.
- ``native``: compiled CPU kernels, float32, float64, bfloat16, float16.
- ``cuda``: GPU kernels in CUDA C++, float32, bfloat16, float16. With ``MSFORMER_CUDA_EMULATE=1`` in the environment,
  when they are built and when msformer_kernels is first imported, they run on CPU tensors through an emulation, for
  tests.
- ``triton``: GPU kernels, float32, bfloat16, float16. With ``TRITON_INTERPRET=1`` in the environment when
  msformer_kernels is first imported, they run on CPU tensors through Triton's interpreter, for tests.

A backend need not serve every operator, nor every call of one: `why_not` says it for an operator and a call, and the
choice, the errors and `explain` all ask it. A call takes the first of:

1. its ``backend`` argument; if that backend cannot serve the call, the call raises and says why;
2. the innermost `use_backend`; likewise, except that an operator for which the backend has no kernels at all gets the
   default;
3. the environment variable ``MSFORMER_BACKEND``, as `use_backend`;
4. by default the fastest backend for the device that serves the call, else ``reference``.

Under `torch.compile` and `torch.export` the first two are part of the graph, for the user chose them. Without them the
graph names no backend, and 3 and 4 are decided whenever it runs, on the machine that it runs on. An operator for which
no backend has kernels on that device, as `linear` on a GPU, is plain PyTorch in the graph; so is every operator in
`torch.onnx.export`.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeVar

import torch

from msformer_kernels.core.precision import cpu_float32_precision

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_Function = TypeVar("_Function", bound=Callable[..., Any])


class BackendError(RuntimeError):
    """An explicitly chosen backend is not available; the message says why, and which are."""


class Served(Protocol):
    """What the choice needs of an operator."""

    name: str
    served_by: tuple[str, ...]

    def why_not(self, backend: str, call: Any = None) -> str | None: ...


def _why_no_extension(name: str) -> str:
    """Why a compiled extension cannot be imported; empty if it can."""
    try:
        import_module(f"msformer_kernels.{name}")
    except ImportError as error:
        recorded = Path(__file__).parents[1] / f"{name}_error.txt"
        reason = f"{recorded.read_text().splitlines()[0]} (all of it: {recorded})" if recorded.exists() else str(error)
        return f"the compiled extension msformer_kernels.{name} is not available: {reason}"
    return ""


def _find_triton() -> str:
    """Why Triton is not available; empty if it is. It is imported with the first kernel."""
    if find_spec("triton") is None:
        return "the package triton is not installed (on Linux: pip install 'msformer[triton]')"
    return ""


_native_reason = _why_no_extension("_native")
_emulated = os.environ.get("MSFORMER_CUDA_EMULATE") == "1"
_CUDA_LIBRARIES = {"cuda": "_cuda", **({"cpu": "_cuda_emulated"} if _emulated else {})}
_cuda_reasons = {device_type: _why_no_extension(name) for device_type, name in _CUDA_LIBRARIES.items()}
_triton_reason = _find_triton()
_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
# read by torch.compile as a guarded value, which a ContextVar cannot be
_override = threading.local()
_warned = threading.Event()


def _why_not_native(device_type: str, index: int | None, dtype: torch.dtype) -> str | None:
    if device_type != "cpu":
        return f"it serves CPU tensors, these are on {device_type}"
    if _native_reason:
        return _native_reason
    return None if dtype in _FLOATING else f"it has no kernels for {dtype}"


def _why_not_cuda(device_type: str, index: int | None, dtype: torch.dtype) -> str | None:
    if device_type not in _cuda_reasons:
        here = f"these are on {device_type} (its emulation serves the CPU: MSFORMER_CUDA_EMULATE=1)"
        return f"it serves GPU tensors, {here}"
    if reason := _cuda_reasons[device_type] or _why_not_this_gpu(device_type, index):
        return reason
    return None if dtype in _GPU_DTYPES else f"it has no kernels for {dtype}"


def _constant_in_graphs(function: _Function) -> _Function:
    """`torch.compiler.assume_constant_result`, which would import TorchDynamo: a second for every process that compiles
    nothing."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant_in_graphs
def _why_not_this_gpu(device_type: str, index: int | None) -> str:
    """Why the compiled kernels do not run with the driver or on the GPU that is here, the current one without an index;
    empty if they do. A compiler that traces a call takes the answer, and does not look into this."""
    return _ask_gpu(device_type, index)


@functools.cache
def _ask_gpu(device_type: str, index: int | None) -> str:
    library = cuda_library(device_type)
    if library.is_emulated():
        return ""
    if torch.version.hip:
        return "it serves NVIDIA GPUs, this is PyTorch for AMD"
    if reason := library.why_not_this_driver():
        return reason
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    major, minor = torch.cuda.get_device_capability(index)
    oldest = min(library.compiled_for())
    if 10 * major + minor < oldest:
        served = f"{oldest // 10}.{oldest % 10} and newer"
        return f"it is compiled for compute capability {served}, this GPU has {major}.{minor}"
    return ""


@functools.cache
def cuda_library(device_type: str) -> ModuleType:
    """The compiled CUDA kernels for tensors of this device; `why_not` has said that they are there."""
    return import_module(f"msformer_kernels.{_CUDA_LIBRARIES[device_type]}")


@_constant_in_graphs
def cuda_shared_memory(device_type: str, index: int | None) -> int:
    """Bytes of shared memory that a block may have on a device that the CUDA kernels serve."""
    library = cuda_library(device_type)
    if library.is_emulated():
        return int(library.shared_memory())
    with torch.cuda.device(index):
        return int(library.shared_memory())


def _why_not_triton(device_type: str, index: int | None, dtype: torch.dtype) -> str | None:
    if device_type != "cuda" and not (device_type == "cpu" and _interpreted):
        here = f"these are on {device_type} (its interpreter serves the CPU: TRITON_INTERPRET=1)"
        return f"it serves GPU tensors, {here}"
    if _triton_reason:
        return _triton_reason
    return None if dtype in _GPU_DTYPES else f"it has no kernels for {dtype}"


_WHY_NOT: dict[str, Callable[[str, int | None, torch.dtype], str | None]] = {
    "reference": lambda device_type, index, dtype: None,
    "native": _why_not_native,
    "cuda": _why_not_cuda,
    "triton": _why_not_triton,
}
BACKENDS = tuple(_WHY_NOT)
MODULES = {"native": "native", "cuda": "cuda_calls", "triton": "triton_calls"}
"""The module of each backend in the folder of an operator."""
_DEFAULT = {"cpu": ("native",), "cuda": ("cuda", "triton")}
"""By device the backends that a call gets unasked, fastest first."""


def why_not(
    name: str, device_type: str, dtype: torch.dtype, operator: Served | None = None, call: Any = None
) -> str | None:
    """Why backend `name` cannot serve this device and dtype, this operator, this call; None if it can."""
    index = None if call is None else call[0].device.index
    reason = _WHY_NOT[name](device_type, index, dtype)
    return reason if reason is not None or operator is None else operator.why_not(name, call)


def available_backends(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    """The backends that are available for a device and dtype."""
    device_type = torch.device(device).type
    return tuple(name for name in BACKENDS if why_not(name, device_type, dtype) is None)


def _check_name(name: str, source: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}; expected one of {', '.join(BACKENDS)}")


def resolve(
    argument: str | None, device_type: str, dtype: torch.dtype, operator: Served | None = None, call: Any = None
) -> str:
    """The backend for a call with this ``backend`` argument on tensors of this device and dtype, as of now.

    Raises ValueError for an unknown name and BackendError for an explicit choice that cannot serve the call.
    """
    override = getattr(_override, "name", None)
    if argument is not None:
        return _checked(argument, "backend=", device_type, dtype, operator, call)
    if override is not None:
        return _in_scope(override, "use_backend", device_type, dtype, operator, call)
    return _by_machine(device_type, dtype, operator, call)


def choose(operator: Served, argument: str | None, device_type: str, dtype: torch.dtype, call: Any) -> str | None:
    """`resolve` for a call that is made now; None for one that is traced and has no choice of the user's in it.

    Where no machine has kernels for the operator on such a device, the traced call is the reference, for a compiler to
    optimise, in place of an op that would run the reference as a whole.
    """
    if argument is not None or getattr(_override, "name", None) is not None:
        return resolve(argument, device_type, dtype, operator, call)
    if not torch.compiler.is_compiling():
        return _by_machine(device_type, dtype, operator, call)
    if torch.onnx.is_in_onnx_export():  # which has no such ops
        return "reference"
    return None if any(name in operator.served_by for name in _DEFAULT.get(device_type, ())) else "reference"


def when_run(operator: Served, name: str | None, device_type: str, dtype: torch.dtype, call: Any) -> str:
    """The backend of an op that runs with this ``backend``.

    `use_backend` does not count: forward and backward of a graph may run in different threads, and must agree.
    """
    if name is None:
        return _by_machine(device_type, dtype, operator, call)
    return _checked(name, "backend=", device_type, dtype, operator, call)


def _by_machine(device_type: str, dtype: torch.dtype, operator: Served | None, call: Any) -> str:
    name = os.environ.get("MSFORMER_BACKEND")
    if name:
        return _in_scope(name, "MSFORMER_BACKEND", device_type, dtype, operator, call)
    return _default(device_type, dtype, operator, call)


def _in_scope(name: str, source: str, device_type: str, dtype: torch.dtype, operator: Served | None, call: Any) -> str:
    """A choice for many calls; an operator that the backend does not have at all gets the default."""
    _check_name(name, source)
    if operator is not None and name != "reference" and name not in operator.served_by:
        return _default(device_type, dtype, operator, call)
    return _checked(name, source, device_type, dtype, operator, call)


def _checked(name: str, source: str, device_type: str, dtype: torch.dtype, operator: Served | None, call: Any) -> str:
    _check_name(name, source)
    reason = why_not(name, device_type, dtype, operator, call)
    if reason is not None:
        usable = ", ".join(n for n in BACKENDS if why_not(n, device_type, dtype, operator, call) is None)
        raise BackendError(f"backend {name!r} (chosen by {source}) is not available: {reason}; usable here: {usable}")
    return name


def _default(device_type: str, dtype: torch.dtype, operator: Served | None, call: Any) -> str:
    for name in _DEFAULT.get(device_type, ()):
        if why_not(name, device_type, dtype, operator, call) is None:
            return name
    if device_type == "cpu" and _native_reason and dtype in _FLOATING:
        _warn_once()
    return "reference"


def _warn_once() -> None:
    if _warned.is_set() or torch.compiler.is_compiling():
        return
    _warned.set()
    warnings.warn(
        f"msformer_kernels runs on plain PyTorch, several times slower and with more memory: {_native_reason}. "
        "With a C++17 compiler, run: pip install --force-reinstall --no-deps --no-cache-dir msformer",
        RuntimeWarning,
        stacklevel=2,
    )


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, and in this thread, calls without a ``backend`` argument use backend `name`.

    An operator for which that backend has no kernels at all, as Triton has none for `linear`, gets the default.

    Raises ValueError for an unknown name. Whether the backend is available is decided at each call, by its device.
    """
    _check_name(name, "use_backend")
    before = getattr(_override, "name", None)
    _override.name = name
    try:
        yield
    finally:
        _override.name = before


@dataclass(frozen=True)
class Explanation:
    """Which backend a call gets, and why the others are not used. Prints as a table."""

    device_type: str
    dtype: torch.dtype
    chosen: str | None
    """None if a call would be refused."""
    rule: str
    """Why this one; if none, the error that a call would raise."""
    reasons: dict[str, str]
    """For each backend, "usable" with details, or why it is not."""
    operator: str | None = None
    """None: whichever operator, but for those in `exceptions`."""
    exceptions: dict[str, str] = field(default_factory=dict)
    """Operators that get another backend, with that backend and the reason."""

    def __str__(self) -> str:
        subject = f"{self.operator}, " if self.operator else ""
        dtype = str(self.dtype).removeprefix("torch.")
        lines = [f"{subject}{self.device_type}, {dtype}: {self.chosen} ({self.rule})"]
        for name, reason in self.reasons.items():
            lines.append(f"  {'*' if name == self.chosen else ' '} {name:<10} {reason}")
        lines += [f"  but {operator}: {text}" for operator, text in self.exceptions.items()]
        return "\n".join(lines)


def explain(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, operator: str | None = None
) -> Explanation:
    """Tells which backend a call without a ``backend`` argument gets on this device and dtype, and why.

    `operator` names one operator; ``<operator>.explain(...)`` tells it for a call with these very arguments.

    Raises ValueError for an operator that there is not.
    """
    from msformer_kernels.core.operator import OPERATORS

    device_type = torch.device(device).type
    if operator is not None:
        if operator not in OPERATORS:
            raise ValueError(f"operator: expected one of {', '.join(OPERATORS)}, got {operator!r}")
        return explain_call(OPERATORS[operator], None, device_type, dtype, None)
    found = explain_call(None, None, device_type, dtype, None)
    for name, each in OPERATORS.items():
        own = explain_call(each, None, device_type, dtype, None)
        if own.chosen != found.chosen:
            reason = f" ({found.chosen}: {each.why_not(found.chosen)})" if found.chosen and own.chosen else ""
            found.exceptions[name] = f"{own.chosen}{reason}"
    return found


def explain_call(
    operator: Served | None, argument: str | None, device_type: str, dtype: torch.dtype, call: Any
) -> Explanation:
    """`explain` for an operator (any, if None) and a call (any, if None) with this ``backend`` argument."""
    reasons = {}
    for name in BACKENDS:
        reason = why_not(name, device_type, dtype, operator, call)
        reasons[name] = f"not usable: {reason}" if reason else "usable" + _details(name, device_type)
    chosen: str | None
    try:
        chosen = resolve(argument, device_type, dtype, operator, call)
        rule = _rule(argument, chosen)
    except (ValueError, BackendError) as error:
        chosen, rule = None, str(error)
    return Explanation(device_type, dtype, chosen, rule, reasons, operator.name if operator else None)


def _rule(argument: str | None, chosen: str) -> str:
    override, environment = getattr(_override, "name", None), os.environ.get("MSFORMER_BACKEND")
    for name, source in ((argument, "backend="), (override, "use_backend"), (environment, "MSFORMER_BACKEND")):
        if name:
            return f"chosen by {source}" if name == chosen else f"{name}, chosen by {source}, has no kernels for it"
    return "the fastest for the device"


def _details(name: str, device_type: str) -> str:
    if name == "cuda":
        return ", not measured on a GPU yet"
    if name == "native":
        from msformer_kernels import _native

        isas = ", ".join(_native.available_isas())
        refused = _native.why_tiles_are_refused()
        found = f", instruction set {_native.isa()} (of {isas}{f'; no amx: {refused}' if refused else ''})"
        threads = (
            f"{torch.get_num_threads()} threads" if _native.thread_library() else "1 thread: no OpenMP runtime here"
        )
        return f"{found}, {threads}, float32 products of {cpu_float32_precision()} precision"
    if name == "triton" and device_type == "cuda" and torch.cuda.is_available():
        from msformer_kernels.triton import device

        return f", {device.details()}" if device.details() else ""
    return ""
