"""Is a wrong result a compiler's fault? The folded attention, compiled in several ways, and what follows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

AS_IT_IS = "as it is"
WITH_WGMMA = "with wgmma"
"""Even where ptxas is one that may compile it wrongly."""


def compare_variant(cases: list[dict[str, Any]], backend: str, device: str, variant: str) -> list[dict[str, Any]]:
    """The error rule for each case, in this process, whose environment makes the variant."""
    import torch

    from msformer_kernels.triton import device as triton_device

    from .checks import compare
    from .toolchain import ptxas_in_use

    if variant == WITH_WGMMA:
        triton_device.wgmma_is_safe = lambda release: True
    used = ptxas_in_use(os.environ)
    capability = "".join(map(str, torch.cuda.get_device_capability(device)))
    head = {"variant": variant, "ptxas": used[1] if used else "none", "architecture": f"sm_{capability}"}
    head["tuned as"] = triton_device.architecture()
    return [head | compare(case, backend, device) for case in cases]


def judge_variants(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each case and backend."""
    found = []
    for case, backend in dict.fromkeys((row["case"], row["backend"]) for row in rows):
        group = {r["variant"]: r for r in rows if (r["case"], r["backend"]) == (case, backend)}
        right = [name for name, row in group.items() if row["ok"]]
        wrong = [name for name in group if name not in right]
        what = f"{case}, {backend}"
        if AS_IT_IS not in group or len(group) == 1:
            found.append(f"{what}: nothing to compare with")
        elif not wrong:
            ratios = ", ".join(f"{name} {row['ratio']:.2f}" for name, row in group.items())
            found.append(f"{what}: right in every way of compiling; error over eager's: {ratios}")
        elif AS_IT_IS in right:
            found.append(f"{what}: right as it is; WRONG with {' and '.join(wrong)}")
        elif right:
            found.append(f"{what}: MISCOMPILED as it is; right with {' and '.join(right)}")
        else:
            found.append(f"{what}: WRONG in every way of compiling, so it is the kernel, or all of these compilers")
    return found
