"""The C++ unit tests (unit_tests.cpp), compiled and run for every variant of the CPU code that this machine has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "csrc"))
from extensions import LIBRARIES, ONCE_OF_BASE  # noqa: E402
from variants import AMX, EMULATED_TILES, FLAGS, VARIANTS, Variant  # noqa: E402


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++") or shutil.which("clang++")
    if found is None:
        pytest.skip("there is no C++ compiler")
    return found


def compiled(variant: Variant, program: Path, *more: str) -> Path:
    """The program of unit_tests.cpp, at this path."""
    sources = [Path(__file__).with_name("unit_tests.cpp"), *ONCE_OF_BASE]
    flags = [*FLAGS, *variant.flags, *variant.definitions(), f"-I{ROOT / 'csrc'}", "-O1", *more]
    subprocess.run([compiler(), *flags, *map(str, sources), *LIBRARIES, "-o", str(program)], check=True)
    return program


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_unit_tests(variant: Variant, tmp_path: Path) -> None:
    native = pytest.importorskip("msformer_kernels._native")
    if variant.name not in native.available_isas():
        pytest.skip("this machine does not have the variant")
    program = compiled(variant, tmp_path / "unit_tests")
    done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout
    assert done.stdout == "0 failures\n"


def processor_features() -> set[str]:
    """As csrc/variants.py names them."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("the features of the processor are read from /proc/cpuinfo")
    flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
    return {flag.replace("avx512_", "avx512") for flag in flags.split()}


def compiles(variant: Variant, folder: Path) -> bool:
    source = folder / f"{variant.name}.cpp"
    source.write_text(f"#include <immintrin.h>\n{variant.probe}\n" if variant.flags else "")
    arguments = [compiler(), *FLAGS, *variant.flags, "-c", str(source), "-o", str(source.with_suffix(".o"))]
    return subprocess.run(arguments, capture_output=True, check=False).returncode == 0


def test_the_build_has_the_variants_that_the_processor_has(tmp_path: Path) -> None:
    """Every one that the compiler knows, best first, and the one that runs anywhere last."""
    native = pytest.importorskip("msformer_kernels._native")
    features = processor_features()
    usable = [v for v in VARIANTS if set(v.features) <= features and compiles(v, tmp_path) and not v.only_for_tests]
    if native.why_tiles_are_refused() or not {"amx_tile", "amx_bf16"} <= features:
        usable.remove(AMX)
    found = [name for name in native.available_isas() if name != EMULATED_TILES.name]
    assert found == [variant.name for variant in usable]
    assert usable[-1].name == "plain"


def test_a_call_with_too_few_or_too_many_values_is_refused() -> None:
    native = pytest.importorskip("msformer_kernels._native")
    with pytest.raises(ValueError, match="got 3 values, expected more after 3"):
        native.linear_forward((1, 2, 3))
    with pytest.raises(ValueError, match="got 50 values, expected no more after 20"):
        native.linear_forward((0,) * 50)
    with pytest.raises(ValueError, match="expected a smaller one after 1"):
        native.linear_forward((2**40, *(0,) * 19))
    with pytest.raises(TypeError):
        native.linear_forward((*(0,) * 5, "x", *(0,) * 14))
