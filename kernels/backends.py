"""Which backends are here, which one a call gets, and why.

A backend is one implementation of the operators:

- ``reference``: plain PyTorch, any device and dtype, differentiable any number of times; the specification.
- ``native``: compiled CPU kernels, float32, float64, bfloat16, float16.
- ``triton``: GPU kernels, float32, bfloat16, float16. With ``TRITON_INTERPRET=1`` in the environment when
  msformer_kernels is first imported, they run on CPU tensors through Triton's interpreter, for tests.
- ``cuda``: not part of this version.

A call takes the first of: its ``backend`` argument, the innermost `use_backend`, the environment variable
``MSFORMER_BACKEND``, the fastest backend for the device. The first three are explicit: if that backend cannot be had,
the call raises and says why. Only the last one falls back, to ``reference``, with one warning. A function under
`torch.compile` is compiled again for another argument or `use_backend`, but keeps the environment it was traced with.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

BACKENDS = ("reference", "native", "triton", "cuda")
_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class BackendError(RuntimeError):
    """An explicitly chosen backend cannot be had; the message says why and what can."""


def _import_native() -> tuple[bool, str]:
    """Whether the compiled extension can be imported, and why not."""
    try:
        import_module("msformer_kernels._native")
    except ImportError as error:
        recorded = Path(__file__).with_name("_native_error.txt")
        reason = f"{recorded.read_text().splitlines()[0]} (all of it: {recorded})" if recorded.exists() else str(error)
        return False, f"the compiled extension msformer_kernels._native cannot be had: {reason}"
    return True, ""


def _find_triton() -> str:
    """Why Triton cannot be had; empty if it can. It is imported with the first kernel."""
    if find_spec("triton") is None:
        return "the package triton is not installed (on Linux: pip install 'msformer[triton]')"
    return ""


_native_imported, _native_reason = _import_native()
_triton_reason = _find_triton()
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
# read by torch.compile as a guarded value, which a ContextVar cannot be
_override = threading.local()
_warned = threading.Event()


def why_not(name: str, device_type: str = "cpu", dtype: torch.dtype = torch.float32) -> str | None:
    """Why backend `name` cannot serve this device and dtype; None if it can."""
    if name == "reference":
        return None
    if name == "native":
        if device_type != "cpu":
            return f"it serves CPU tensors, these are on {device_type}"
        if not _native_imported:
            return _native_reason
        return None if dtype in _FLOATING else f"it has no kernels for {dtype}"
    if name == "triton":
        if device_type != "cuda" and not (device_type == "cpu" and _interpreted):
            here = f"these are on {device_type} (its interpreter serves the CPU: TRITON_INTERPRET=1)"
            return f"it serves GPU tensors, {here}"
        if _triton_reason:
            return _triton_reason
        return None if dtype in _TRITON_DTYPES else f"it has no kernels for {dtype}"
    return "its kernels are not part of this version"


def available_backends(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    """The backends that can be had for a device and dtype."""
    device_type = torch.device(device).type
    return tuple(name for name in BACKENDS if why_not(name, device_type, dtype) is None)


def _requested(argument: str | None) -> tuple[str | None, str]:
    if argument is not None:
        return argument, "backend="
    override = getattr(_override, "name", None)
    if override is not None:
        return override, "use_backend"
    return os.environ.get("MSFORMER_BACKEND") or None, "MSFORMER_BACKEND"


def _check_name(name: str, source: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}; expected one of {', '.join(BACKENDS)}")


def resolve(argument: str | None, device_type: str, dtype: torch.dtype) -> str:
    """The backend for a call with this ``backend`` argument on tensors of this device and dtype.

    Raises ValueError for an unknown name and BackendError for an explicit choice that cannot be had.
    """
    name, source = _requested(argument)
    if name is None:
        return _default(device_type, dtype)
    _check_name(name, source)
    reason = why_not(name, device_type, dtype)
    if reason is not None:
        usable = ", ".join(available_backends(device_type, dtype))
        raise BackendError(f"backend {name!r} (chosen by {source}) cannot be had: {reason}; usable here: {usable}")
    return name


def _default(device_type: str, dtype: torch.dtype) -> str:
    if device_type == "cuda" and why_not("triton", device_type, dtype) is None:
        return "triton"
    if device_type != "cpu" or dtype not in _FLOATING:
        return "reference"
    if _native_imported:
        return "native"
    if not torch.compiler.is_compiling():
        _warn_once()
    return "reference"


def _warn_once() -> None:
    if _warned.is_set():
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

    Raises ValueError for an unknown name. Whether the backend can be had is decided at each call, by its device.
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
    """Which backend a call on a device gets, and why the others are not used. Prints as a table."""

    device_type: str
    dtype: torch.dtype
    chosen: str | None
    """None if a call would be refused."""
    rule: str
    """Why this one; if none, the error that a call would raise."""
    reasons: dict[str, str]
    """For each backend, "usable" with details, or why it cannot be had."""

    def __str__(self) -> str:
        lines = [f"{self.device_type}, {str(self.dtype).removeprefix('torch.')}: {self.chosen} ({self.rule})"]
        for name, reason in self.reasons.items():
            lines.append(f"  {'*' if name == self.chosen else ' '} {name:<10} {reason}")
        return "\n".join(lines)


def explain(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Explanation:
    """Tells which backend a call without a ``backend`` argument gets on this device and dtype, and why."""
    device_type = torch.device(device).type
    reasons = {}
    for name in BACKENDS:
        reason = why_not(name, device_type, dtype)
        reasons[name] = f"not usable: {reason}" if reason else "usable" + _details(name)
    chosen: str | None
    try:
        chosen = resolve(None, device_type, dtype)
        requested, source = _requested(None)
        rule = "the fastest for the device" if requested is None else f"chosen by {source}"
    except (ValueError, BackendError) as error:
        chosen, rule = None, str(error)
    return Explanation(device_type, dtype, chosen, rule, reasons)


def _details(name: str) -> str:
    if name != "native":
        return ""
    from msformer_kernels import _native

    isas = ", ".join(_native.available_isas())
    return f", instruction set {_native.isa()} (of {isas}), {torch.get_num_threads()} threads"
