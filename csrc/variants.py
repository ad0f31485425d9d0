"""The variants of the CPU code, for setup.py and the tests. This is the one place that declares them: compile flags,
namespace, vector width, engine, detection and the dispatch table follow from it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-DNDEBUG"]
# multiply-add contraction is where the speed is; no value depends on errno or on floating-point traps
FLAGS += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]


@dataclass(frozen=True)
class Variant:
    """The CPU code for one kind of processor. Its name is also its namespace and what MSFORMER_CPU_ISA calls it."""

    name: str
    vector_bytes: int
    flags: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    """What the processor must have, as csrc/cpu/base/processor.cpp names it."""
    bfloat16_engine: str = "Values<float>"
    """How products of bfloat16 tensors are done: a class of csrc/cpu/engine."""
    tile_unit: tuple[str, str] | None = None
    """The class that multiplies tiles of bfloat16, and its header in csrc/cpu/engine."""
    detection: tuple[str, ...] = ()
    """Further conditions, in C++ of csrc/cpu/base/tile_permission.h."""
    probe: str = ""
    """A line of C++ that an old compiler may not know; without it there is no such variant."""
    only_for_tests: bool = False
    """Built where MSFORMER_EMULATE_TILES=1, and never chosen unasked."""

    def definitions(self) -> list[str]:
        names = {
            "MSFORMER_VARIANT": self.name,
            "MSFORMER_VECTOR_BYTES": self.vector_bytes,
            "MSFORMER_BFLOAT16_ENGINE": self.bfloat16_engine,
        }
        if self.tile_unit:
            names |= {"MSFORMER_TILE_UNIT": self.tile_unit[0], "MSFORMER_TILE_HEADER": self.tile_unit[1]}
        return [f"-D{name}={value}" for name, value in names.items()]

    def condition(self) -> str:
        """Whether the processor has it, in C++."""
        conditions = [f'processor_has("{name}")' for name in self.features]
        return " && ".join([*conditions, *self.detection]) or "true"


PLAIN = Variant("plain", vector_bytes=16)
AVX2 = Variant("avx2", 32, flags=("-mavx2", "-mfma", "-mf16c"), features=("avx2", "fma"))
AVX512 = Variant(
    "avx512",
    64,
    flags=(*AVX2.flags, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
    features=(*AVX2.features, "avx512f", "avx512bw", "avx512dq", "avx512vl"),
)
AVX512_BF16 = replace(
    AVX512,
    name="avx512_bf16",
    flags=(*AVX512.flags, "-mavx512bf16"),
    features=(*AVX512.features, "avx512bf16"),
    bfloat16_engine="Pairs",
    probe="__m512 add(__m512 s, __m512bh a) { return _mm512_dpbf16_ps(s, a, a); }",
)
AMX = replace(
    AVX512_BF16,
    name="amx",
    tile_unit=("Amx", "amx.h"),
    detection=("tiles_are_permitted()",),
    probe='void clear() { asm volatile("tilezero %%tmm0\\n\\ttdpbf16ps %%tmm2, %%tmm1, %%tmm0" ::); }',
)
# vectors as wide as those of the variant that it stands for, on processors that need not have them; quick to compile
EMULATED_TILES = replace(
    AVX2,
    name="emulated_tiles",
    vector_bytes=64,
    flags=(*AVX2.flags, "-Wno-psabi", "-O1"),
    tile_unit=("EmulatedTiles", "emulated_tiles.h"),
    only_for_tests=True,
)
VARIANTS = [AMX, AVX512_BF16, AVX512, AVX2, PLAIN, EMULATED_TILES]
"""Best first, then what is only for tests. A build has those that its compiler knows."""


def write_variants_header(path: Path, variants: list[Variant]) -> None:
    """What csrc/dispatch.cpp includes; only written if it changes, so that nothing is compiled again for it."""
    rows = "".join(f" \\\n  X({variant.name}, {variant.condition()})" for variant in variants)
    text = f"// Made from csrc/variants.py, best first.\n#define MSFORMER_FOR_EACH_VARIANT(X){rows}\n"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
