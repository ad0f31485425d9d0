"""What the CUDA kernels launch, and move between global memory and the chip, as their emulation on the CPU tells."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

INSTEAD, TRAFFIC = 1, 2
"""What is recorded: launches in place of running them, or what launches move while they run."""


@dataclass(frozen=True)
class Launch:
    """One launch; the bytes are 0 where they are not counted."""

    kernel: str
    engine: str
    """The template arguments: how products are done, and the form."""
    threads: int
    shared: int
    """Bytes of shared memory."""
    asked: int
    """Bytes that the kernel asks global memory for, reads and writes; a cache serves some of them."""
    read: int
    """Bytes of the sectors of 32 bytes that are read, each counted once: what a large cache lets through."""
    written: int


def name_and_engine(function: str) -> tuple[str, str]:
    """("k", "F16, 64") of the C++ name `void space::k<space::F16, 64>(...)`."""
    plain = re.sub(r"\(anonymous namespace\)|\{anonymous\}|<unnamed>", "", function)
    plain = re.sub(r"\b\w*::|::|\((int|bool)\)", "", plain)
    found = re.search(r"(\w+_kernel)(?:<(.*?)>+)?(?=\(|$)", plain)
    if not found:
        raise ValueError(f"no kernel: {function}")
    engine = (found[2] or "").strip()
    return found[1], engine + ">" * (engine.count("<") - engine.count(">"))


@contextmanager
def recorded(what: int) -> Iterator[list[Launch]]:
    """A list that has the launches of the block when it ends. Needs the emulation (MSFORMER_CUDA_EMULATE=1)."""
    from msformer_kernels.core.backends import cuda_library

    library, found = cuda_library("cpu"), list[Launch]()
    library.record_launches(what)
    try:
        yield found
    finally:
        for function, *numbers in library.record_launches(0):
            kernel = re.search(r"\bkernel = &?(.*?)[;,] Arguments = ", function)
            assert kernel, function
            found.append(Launch(*name_and_engine(kernel[1]), *numbers))
