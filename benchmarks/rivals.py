"""Who is compared: the published structure, a clean eager form, that form compiled, and the backends.

- ``published``: `benchmarks.published`.
- ``eager``: the layers of `msformer_kernels` on backend "reference": each product once, Linear in place of 1x1
  convolutions, channels-last depthwise convolution.
- ``compile``: `torch.compile` of ``eager``, one graph, for this shape alone.
- ``native`` and whatever other backends there are: the layers on that backend.

In bfloat16 the backends get weights and inputs in bfloat16. The others run as PyTorch recommends, under autocast with
weights and inputs in float32. All of them get the same numbers, which bfloat16 can hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch

import msformer_kernels

PLAIN = ("published", "eager", "compile")
EXACT = "exact"
"""Not a rival: the clean form in float64, which the results of all are compared with; or "native exact", and so on."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Function = TypeVar("Function", bound=Callable[..., Any])


def backends() -> tuple[str, ...]:
    """Ours, that can be had here."""
    # on the CPU, Triton has only its interpreter
    return tuple(name for name in msformer_kernels.available_backends() if name not in ("reference", "triton"))


def all_rivals() -> tuple[str, ...]:
    return PLAIN + backends()


def is_exact(rival: str) -> bool:
    return rival.endswith(EXACT)


def backend_of(rival: str) -> str:
    """The backend that the layers of a rival run on."""
    return "reference" if rival in (*PLAIN, EXACT) else rival.split()[0]


def is_ours(rival: str) -> bool:
    return backend_of(rival) != "reference"


def storage_dtype(rival: str, dtype: str) -> torch.dtype:
    """Of the weights and inputs of a layer."""
    if is_exact(rival):
        return torch.float64
    return DTYPES[dtype] if is_ours(rival) else torch.float32


def uses_autocast(rival: str, dtype: str, whole_model: bool) -> bool:
    """A whole model keeps its weights in float32, ours too."""
    return dtype == "bfloat16" and not is_exact(rival) and (whole_model or not is_ours(rival))


def mode(rival: str, dtype: str, whole_model: bool) -> str:
    """How the rival computes, in a word, for the report."""
    if dtype != "bfloat16":
        return dtype
    return "autocast" if uses_autocast(rival, dtype, whole_model) else "bfloat16 tensors"


@contextmanager
def running(rival: str, dtype: str, whole_model: bool = False) -> Iterator[None]:
    """The backend and autocast that a rival runs under."""
    autocast = torch.autocast("cpu", torch.bfloat16) if uses_autocast(rival, dtype, whole_model) else nullcontext()
    with msformer_kernels.use_backend(backend_of(rival)), autocast:
        yield


def compiled(rival: str, function: Function) -> Function:
    """`function`, compiled if that is what the rival is."""
    if rival != "compile":
        return function
    return cast(Function, torch.compile(function, fullgraph=True, dynamic=False))
