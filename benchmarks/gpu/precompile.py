"""Compiles Triton kernels before they are needed, on several processes, into Triton's cache on disk.

Every process makes all calls, launches nothing, and compiles those kernels whose signature falls to it. So nothing is
compiled twice, and each kernel is specialised exactly as the later call will ask for it.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import msformer_kernels as kernels

from .cases import GpuCase, set_tf32
from .checks import outputs_and_gradients, random_tokens
from .items import Skip

MODEL_SIDE = 257


def signature(name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> str:
    """What a kernel is specialised for: dtypes and alignment of tensors, whether integers are 1 or divide by 16."""
    parts = [name]
    for value in arguments:
        if isinstance(value, Tensor):
            parts.append(f"{value.dtype}{value.data_ptr() % 16 == 0}")
        elif isinstance(value, int):
            parts.append(f"{value == 1}{value % 16 == 0}{value >= 2**31}")
        else:
            parts.append(type(value).__name__)
    return " ".join([*parts, *(f"{k}={v}" for k, v in sorted(options.items()))])


@contextmanager
def only_compiled(part: int, parts: int, failures: list[str]) -> Iterator[dict[str, Any]]:
    """Within the block, launches of Triton kernels compile this part of them, by signature, in place of running."""
    from triton.runtime.jit import JITFunction

    found: dict[str, Any] = {}
    launch = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        key = signature(self.__name__, arguments, options)
        if zlib.crc32(key.encode()) % parts != part or key in found:
            return
        found[key] = None
        try:
            found[key] = compiled = launch(self, *arguments, grid=grid, warmup=True, **options)
            _ = compiled.run  # makes the launcher and loads the kernel
        except Exception as error:  # compilers raise whatever they like; the stage that needs it will fail
            failures.append(f"{self.__name__}: {type(error).__name__}: {error}"[:500])

    with mock.patch.object(JITFunction, "run", compile_only):
        yield found


def compile_part(
    cases: list[dict[str, Any]], backend: str, part: int, parts: int, device: str, model: bool
) -> list[dict[str, Any]]:
    """Compiles a part of the kernels of these cases, and of a step of the model; a row for each kernel."""
    failures: list[str] = []
    started = time.perf_counter()
    with only_compiled(part, parts, failures) as found:
        for content in cases:
            case = GpuCase.from_json(content)
            try:
                case.check_backend(backend)
                set_tf32(case.dtype)
                outputs_and_gradients(case, case.storage, random_tokens(case, 0, device), backend, 0)
            except Skip:
                continue
            except Exception as error:  # the other cases still have kernels to compile
                failures.append(f"{case}: {type(error).__name__}: {error}"[:500])
        if model:
            for dtype in ("float32", "tf32"):
                set_tf32(dtype)
                _model_step(backend, device)
    rows = [
        {"kernel": key.split()[0], "backend": backend, **_usage(compiled)}
        for key, compiled in found.items()
        if compiled is not None
    ]
    seconds = round(time.perf_counter() - started, 1)
    summary = {"part": part, "backend": backend, "kernels": len(rows), "seconds": seconds, "ok": not failures}
    return [*rows, summary | {"failures": failures}]


def _usage(compiled: Any) -> dict[str, Any]:
    """Registers a thread, spills and shared memory, where this version of Triton tells them."""
    names = {"registers": "n_regs", "spills": "n_spills"}
    found = {name: getattr(compiled, attribute, None) for name, attribute in names.items()}
    return found | {"shared": getattr(compiled.metadata, "shared", None)}


def _model_step(backend: str, device: str) -> None:
    from msformer.losses import total_loss
    from msformer.model import MSFormer
    from msformer.presets import LossWeights

    model = MSFormer().to(device)
    image = torch.rand(1, 3, MODEL_SIDE, MODEL_SIDE, device=device)
    with kernels.use_backend(backend):
        output = model(image)
        total_loss(output, output.logits.argmax(1), LossWeights()).backward()
