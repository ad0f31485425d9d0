"""Why this machine does not run a variant of the CPU kernels or a backend: a line of the report for each."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

import msformer_kernels

from .machine import usable_variants

FEATURES = {
    "amx": ("amx_tile", "amx_bf16"),
    "avx512_bf16": ("avx512_bf16",),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "avx2": ("avx2", "fma"),
}
"""Variants of the kernels for x86-64, the best first, and what the processor must have, as /proc/cpuinfo names it."""


def known_variants() -> tuple[str, ...]:
    """Of the CPU kernels for this kind of processor, whether this machine can use them or not."""
    names = [*(FEATURES if _is_x86() else ()), *usable_variants()]
    return tuple(dict.fromkeys(names))


def missing_variants() -> dict[str, str]:
    """Those that this process cannot use, and why."""
    usable = usable_variants()
    if not usable:
        return {}
    return {name: why_not(name) for name in known_variants() if name not in usable}


def why_not(variant: str) -> str:
    """The reason, for a variant that is not usable."""
    from msformer_kernels import _native

    if variant == "amx" and (refused := _native.why_tiles_are_refused()):
        return refused
    flags = _flags()
    lacking = [name for name in FEATURES[variant] if name not in flags]
    if flags and lacking:
        return f"the processor has no {', '.join(lacking)}"
    return "this build of the kernels does not have it" if flags else "the processor does not have it"


def left_out() -> list[str]:
    """What this machine cannot run, a line each."""
    if "native" not in msformer_kernels.available_backends():
        reason = msformer_kernels.explain("cpu").reasons["native"]
        return [f"native kernels: {reason.removeprefix('not usable: ')}"]
    from msformer_kernels import _native

    found = [f"CPU variant {name}: {reason}" for name, reason in missing_variants().items()]
    if torch.get_num_threads() > 1 and not _native.thread_library():
        found.append("native kernels on more than one thread: no OpenMP runtime here")
    return found


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _flags() -> frozenset[str]:
    """Of the processor; empty where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.split(":")[1].split()) for line in lines if line.startswith("flags")), frozenset())
