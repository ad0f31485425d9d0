"""Builds the CPU kernels for a sanitizer; the variants and the flags are the only difference to setup.py's build."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[4]
sys.path.insert(0, str(ROOT / "csrc"))
import extensions  # noqa: E402
import variants  # noqa: E402
from toolchain import find_compiler  # noqa: E402

FLAGS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}
LIBRARIES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
"""Of the compiler, for the interpreter, which is not built with them."""
VARIANTS, ONCE, SHARED = variants.VARIANTS[:], extensions.NATIVE_ONCE[:], extensions.SHARED_LIBRARY[:]
COMMON = [flag for flag in variants.FLAGS if flag not in ("-O3", "-DNDEBUG")]
"""As setup.py has them: each build changes the lists themselves."""
TEAM = Path(__file__).with_name("team.cpp")


def build(kind: str, names: list[str], folder: Path) -> Path:
    """The module `_native` of these variants, for the sanitizer `kind`. What is there already is not compiled again.

    Raises ValueError for a variant that there is not, BuildFailed where the compiler fails.
    """
    known = [variant.name for variant in VARIANTS]
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"variants: expected some of {', '.join(known)}; got {', '.join(unknown)}")
    variants.VARIANTS[:] = [variant for variant in VARIANTS if variant.name in names]
    variants.FLAGS[:] = [*COMMON, "-O1", "-g1", "-fno-omit-frame-pointer", *FLAGS[kind]]
    extensions.SHARED_LIBRARY[:] = [*SHARED, *FLAGS[kind]]  # the linker gets no FLAGS
    extensions.NATIVE_ONCE[:] = [TEAM if kind == "thread" and path.name == TEAM.name else path for path in ONCE]
    output = folder / "_native.so"
    extensions.build_native(output, folder)
    return output


def preload(kind: str) -> str:
    """LD_PRELOAD of the interpreter. Raises FileNotFoundError where the compiler has no such library."""
    paths = []
    for name in LIBRARIES[kind]:
        command = [*find_compiler(), f"-print-file-name={name}"]
        path = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
        if not path.is_absolute():
            raise FileNotFoundError(f"{command[0]} has no {name}")
        paths.append(str(path))
    return " ".join(paths)
