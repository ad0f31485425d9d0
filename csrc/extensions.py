"""The compiled extensions of msformer_kernels: what each is made of, and how. setup.py builds them.

None of them links torch, so one build works with every torch; each is a pybind11 module.

- `_native`: the CPU kernels, compiled once per variant (variants.py); the best that the processor has is picked at run
  time.
- `_cuda`: the CUDA kernels, where there is an nvcc, for the architectures of toolchain.py and as PTX of the first of
  them. The CUDA runtime is linked statically and hidden: the module loads on machines without a driver.
- `_cuda_emulated`: the same sources for the CPU (cuda/emulated.h), for tests; only with MSFORMER_CUDA_EMULATE=1.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from toolchain import (
    NotBuilt,
    Object,
    cuda_architectures,
    find_compiler,
    find_nvcc,
    python_includes,
    run_ninja,
)
from variants import FLAGS, VARIANTS, Variant, write_variants_header

CSRC = Path(__file__).resolve().parent
SHARED_LIBRARY = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
LIBRARIES = ["-ldl", "-pthread"] if sys.platform == "linux" else []  # parts of libc since glibc 2.34

ONCE_OF_BASE = [
    CSRC / "cpu/base" / f"{name}.cpp" for name in ("fork", "memory", "processor", "team", "tile_permission")
]
NATIVE_ONCE = [CSRC / "module.cpp", CSRC / "dispatch.cpp", *ONCE_OF_BASE]
NATIVE_KERNELS = sorted(path for path in (CSRC / "cpu").glob("*/*.cpp") if path not in NATIVE_ONCE)

CUDA_MODULE = CSRC / "cuda/module.cpp"
CUDA_KERNELS = sorted((CSRC / "cuda").glob("*.cu"))
CUDA_HOST_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden"]
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xfatbin=-compress-all"]
EMULATION_FLAGS = [*CUDA_HOST_FLAGS, "-g", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DMSFORMER_CUDA_EMULATE"]


def supported_variants(compiler: list[str], temporary: Path) -> list[Variant]:
    """The variants to build: those that the compiler knows. One for another processor knows none but the plain one,
    older ones have never heard of AVX-512 BF16."""

    def is_known(variant: Variant) -> bool:
        if not variant.flags:
            return True
        probe = temporary / f"{variant.name}.cpp"
        probe.write_text(f"#include <immintrin.h>\n{variant.probe}\n")
        command = [*compiler, *variant.flags, "-c", str(probe), "-o", str(probe.with_suffix(".o"))]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    wanted = [v for v in VARIANTS if not v.only_for_tests or os.environ.get("MSFORMER_EMULATE_TILES") == "1"]
    return [variant for variant in wanted if is_known(variant)]


def build_native(output: Path, folder: Path) -> None:
    """The CPU kernels. The includes are for what is compiled once alone: their folders differ from one isolated build
    to the next, and what does not need them is then not compiled again."""
    compiler, includes = find_compiler(), python_includes()
    folder.mkdir(parents=True, exist_ok=True)
    variants = supported_variants(compiler, folder)
    write_variants_header(folder / "variants.h", variants)
    command = [*compiler, *FLAGS]
    objects = [Object(f"{path.stem}.o", path, [*command, *includes, f"-I{folder}"]) for path in NATIVE_ONCE]
    # the plainest variant comes first: where the linker merges equal inline functions it keeps the first, which runs
    # anywhere
    of_tests = [variant for variant in variants if variant.only_for_tests]
    for variant in [*(variant for variant in reversed(variants) if variant not in of_tests), *of_tests]:
        own = [*command, *variant.flags, *variant.definitions()]
        objects += [Object(f"{variant.name}/{path.stem}.o", path, own) for path in NATIVE_KERNELS]
    run_ninja(output, folder, objects, [*compiler, *SHARED_LIBRARY, *LIBRARIES])


def host_compiler_of_nvcc(compiler: list[str]) -> list[str]:
    """CXX holds for nvcc, too, unless it has an NVCC_CCBIN of its own or CXX carries options."""
    own = "CXX" in os.environ and "NVCC_CCBIN" not in os.environ and len(compiler) == 1
    return [f"-ccbin={compiler[0]}"] if own else []


def code_flags(architectures: tuple[int, ...]) -> list[str]:
    """Code for each of the architectures, and PTX of the first for what is newer."""
    first, *others = architectures
    return [
        f"-gencode=arch=compute_{first},code=[sm_{first},compute_{first}]",
        *(f"-gencode=arch=compute_{each},code=sm_{each}" for each in others),
    ]


def build_cuda(output: Path, folder: Path) -> None:
    """The CUDA kernels, two architectures at a time. nvcc links, for it knows where its runtime is."""
    if os.environ.get("MSFORMER_CUDA") == "0":
        raise NotBuilt(
            "this build leaves it out, as wheels do (MSFORMER_CUDA=0); where there is an nvcc: "
            "pip install --force-reinstall --no-deps --no-binary msformer msformer"
        )
    nvcc, compiler = find_nvcc(), find_compiler()
    command = [nvcc, *host_compiler_of_nvcc(compiler)]
    compile_kernels = [*command, *CUDA_FLAGS, "--threads=2", *code_flags(cuda_architectures(nvcc))]
    objects = [Object(f"{path.stem}.o", path, compile_kernels) for path in CUDA_KERNELS]
    objects.append(Object("module.o", CUDA_MODULE, [*compiler, *CUDA_HOST_FLAGS, *python_includes()]))
    run_ninja(output, folder, objects, [*command, "-shared", "-cudart=static", "-Xlinker=--exclude-libs=ALL"])


def emulation_is_wanted() -> bool:
    return os.environ.get("MSFORMER_CUDA_EMULATE") == "1"


def build_emulation(output: Path, folder: Path, *flags: str) -> None:
    """The CUDA kernels for the CPU, with these flags in addition."""
    compiler = find_compiler()
    command = [*compiler, *EMULATION_FLAGS, *flags]
    # -x: a plain compiler does not know .cu
    objects = [Object(f"{path.stem}.o", path, [*command, "-x", "c++"]) for path in CUDA_KERNELS]
    objects.append(Object("module.o", CUDA_MODULE, [*command, *python_includes()]))
    run_ninja(output, folder, objects, [*compiler, *SHARED_LIBRARY, *flags])


def build_cuda_emulated(output: Path, folder: Path) -> None:
    """The emulation, where it is wanted."""
    if not emulation_is_wanted():
        raise NotBuilt("it is for tests, and built where MSFORMER_CUDA_EMULATE=1 is in the environment of the install")
    build_emulation(output, folder)


def is_set(name: str) -> bool:
    return os.environ.get(name) == "1"


@dataclass(frozen=True)
class BuiltModule:
    """A module of msformer_kernels that may be missing."""

    what: str
    sources: list[Path]
    build: Callable[[Path, Path], None]
    """Builds it at a path, whose name carries the Python ABI, with object files in a folder. Raises NotBuilt."""
    is_required: Callable[[], bool]


EXTENSIONS = {
    "_native": BuiltModule(
        "CPU kernels",
        [*NATIVE_ONCE, *NATIVE_KERNELS],
        build_native,
        lambda: is_set("MSFORMER_REQUIRE_NATIVE"),
    ),
    "_cuda": BuiltModule(
        "CUDA kernels",
        [CUDA_MODULE, *CUDA_KERNELS],
        build_cuda,
        lambda: is_set("MSFORMER_REQUIRE_CUDA"),
    ),
    "_cuda_emulated": BuiltModule(
        "emulated CUDA kernels",
        [CUDA_MODULE, *CUDA_KERNELS],
        build_cuda_emulated,
        lambda: is_set("MSFORMER_REQUIRE_NATIVE") and emulation_is_wanted(),
    ),
}
