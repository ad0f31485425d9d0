"""What the current GPU is to the kernels: the family they are tuned for, and how they are compiled for it.

**Warpgroup products on Hopper.** For sm_90 Triton makes products of large tiles of wgmma, asynchronous instructions
that may take their left operand from registers: the accumulator of the product before, or its transpose. A ptxas before
CUDA 13.3 may write to such registers before the instruction has read them; results are then wrong without an error.
Triton brings a ptxas of 13.3 or later for Hopper from version 3.9 on; 3.4 to 3.8 bring 12.8 or 12.9. Nearly all
products with tokens of ours are of that kind, so with such a ptxas the kernels are compiled through the intermediate
code of sm_80, with the tiles of sm_80, for mma.sync. With 3.4 to 3.8, ``TRITON_PTXAS_PATH`` may name a newer ptxas.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import triton

from msformer_kernels.triton.tiles import INTERPRETED

SOUND_PTXAS = (13, 3)
"""The first that keeps register operands of wgmma until they are read."""
MMA_SYNC = "sm_90_mma"
"""The family of a GPU of sm_90 whose products are made without wgmma."""


Release = tuple[int, int]


def wgmma_is_safe(release: Release | None) -> bool:
    """With a ptxas of this release (None: of an unknown one)."""
    return release is not None and release >= SOUND_PTXAS


def family(backend: str, arch: int | str, release: Release | None) -> str:
    """Which GPUs are tuned for alike; `release` is that of ptxas, None if that is not known.

    sm_80; sm_89 with 99 KiB of shared memory (sm_86, sm_89); sm_90; sm_90_mma; sm_100 (sm_103, sm_110); sm_120
    (sm_121); gfx942.
    """
    if backend == "hip":
        return "gfx942"
    number = int(arch)
    if number >= 120:
        return "sm_120"
    if number >= 100:
        return "sm_100"
    if number >= 90:
        return "sm_90" if wgmma_is_safe(release) else MMA_SYNC
    return "sm_89" if number in (86, 89) else "sm_80"


def ptxas_release(version: str) -> Release | None:
    """From what ``ptxas --version`` prints; None if there is no release in it."""
    found = re.search(r"release (\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else None


def ptxas(arch: int) -> Release | None:
    """The release of the ptxas that this Triton uses for an architecture; None if there is none."""
    from triton.backends.nvidia.compiler import get_ptxas_version

    try:
        return ptxas_release(get_ptxas_version(arch))
    except TypeError:  # before Triton 3.5 there was one for all
        return ptxas_release(get_ptxas_version())
    except (RuntimeError, OSError):
        return None


@lru_cache
def _family_of_device(device: int, driver: Any) -> str:
    target = driver.get_current_target()
    release = ptxas(int(target.arch)) if target.backend == "cuda" else None
    return family(target.backend, target.arch, release)


def architecture() -> str:
    """The `family` of the current GPU; cpu when interpreted."""
    if INTERPRETED.value:
        return "cpu"
    driver = triton.runtime.driver.active
    return _family_of_device(driver.get_current_device(), driver)


_COMPILED: dict[str, Any] = {"enable_fp_fusion": True}
_MMA_SYNC_COMPILED = _COMPILED | {"arch": "sm80"}


def compile_options() -> dict[str, Any]:
    """How every kernel is compiled: with fused multiply-adds, whatever the default of this version of Triton is, and on
    Hopper without wgmma where that is not safe."""
    return _MMA_SYNC_COMPILED if architecture() == MMA_SYNC else _COMPILED


def details() -> str:
    """For `explain`: what a user should know about the current GPU."""
    if architecture() != MMA_SYNC:
        return ""
    release = ptxas(90)
    name = "of unknown release" if release is None else ".".join(map(str, release))
    sound = ".".join(map(str, SOUND_PTXAS))
    return (
        f"products without wgmma, for ptxas {name} may compile it wrongly on this GPU (slower; Triton 3.9 brings a "
        f"sound one, {sound} or later, and TRITON_PTXAS_PATH may name one)"
    )
