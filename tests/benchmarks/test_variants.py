"""Candidates in processes of their own, each with a variant of the CPU kernels; and the tile rate's loop."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import machine, variants
from benchmarks.cases import Case, Shape
from benchmarks.machine import Ceilings
from benchmarks.measure import Settings, measure_case
from benchmarks.rivals import backend_of, is_ours, variant_of
from benchmarks.rows import FAILED, MEASURED, Row
from benchmarks.variants import Elsewhere, in_variants, make_anywhere
from benchmarks.workloads import Candidate, make_candidate

CASE = Case("attention", Shape(1, 5, 4, 8), "float32", "training", precision="medium")
ROOT = Path(__file__).parents[2]
NATIVE = pytest.mark.skipif(not machine.usable_variants(), reason="the extension was not built")


def test_a_rival_names_its_variant() -> None:
    assert [variant_of(rival) for rival in ("native (avx2)", "native", "eager")] == ["avx2", None, None]
    assert backend_of("native (avx2)") == "native"
    assert is_ours("native (avx2)")


def test_all_are_those_of_the_machine_without_what_is_for_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "usable_variants", lambda: ("amx", "plain", "emulated_tiles"))
    assert in_variants(["eager", "native"], ["all"]) == ("eager", "native (amx)", "native (plain)")
    assert in_variants(["native"], ["emulated_tiles", "amx", "all"]) == (
        "native (emulated_tiles)",
        "native (amx)",
        "native (plain)",
    )


def _settings_there() -> tuple[str, str, int]:
    return machine.instruction_set(), torch.get_float32_matmul_precision(), torch.get_num_threads()


def _die() -> None:
    os._exit(1)


def measured(make: object) -> Row:
    rest = (Settings(3), Ceilings(1e9, "", 1e9, ""), lambda: None, lambda what: None, make)
    (row,) = measure_case(CASE, ["native (plain)"], *rest)  # type: ignore[arg-type]
    return row


@NATIVE
@pytest.mark.slow(15)
def test_a_variant_is_measured_in_its_process_and_one_that_dies_costs_a_row() -> None:
    def make(case: Case, rival: str) -> Candidate:
        candidate = make_anywhere(case, rival, keep_memory=True)
        if isinstance(candidate, Elsewhere):
            assert candidate._there(_settings_there) == ("plain", "medium", torch.get_num_threads())
        return candidate

    def make_dying(case: Case, rival: str) -> Candidate:
        candidate = make(case, rival)
        if isinstance(candidate, Elsewhere):
            candidate._there(_die)
        return candidate

    broken = measured(make_dying)
    assert broken.status == FAILED
    assert broken.reason.startswith("BrokenProcessPool")
    row = measured(make)
    assert (row.status, len(row.samples), row.precision) == (MEASURED, 3, "medium")
    assert row.error is not None
    assert 0 < row.error < 1e-5  # this variant has nothing faster than float32
    assert "MSFORMER_CPU_ISA" not in os.environ
    assert variants._process("plain").submit(os.getpid).result() != os.getpid()
    here = make_candidate(CASE, "native")
    here.run()
    there = make_anywhere(CASE, "native (plain)", keep_memory=True)
    there.run()
    assert {name: value.shape for name, value in there.results().items()} == {
        name: value.shape for name, value in here.results().items()
    }


MAIN = """
#include <cstdint>
#include <cstdio>
#include "trap.h"
extern "C" double tile_products(int, std::int64_t, float*);
int main() {
  trap_tile_instructions();
  float sum;
  const double flop = tile_products(2, 5, &sum);
  std::printf("%.0f %.0f %d", flop, sum, tiles_are_released());
}
"""


@pytest.mark.slow(3)
@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64") or sys.platform != "linux", reason="AMX on Linux only"
)
def test_the_tile_loop_does_the_products_that_it_counts(tmp_path: Path) -> None:
    """Each instruction is executed by a signal handler, with AMX too: the program has no permission to use it."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no compiler")
    traps = ROOT / "tests/kernels/native/tiles"
    (tmp_path / "main.cpp").write_text(MAIN)
    sources = [tmp_path / "main.cpp", traps / "trap.cpp", ROOT / "benchmarks/bfloat16_products.cpp"]
    program = tmp_path / "program"
    flags = ["-O1", "-fopenmp", f"-I{traps}"]
    subprocess.run([compiler, *flags, *map(str, sources), "-o", str(program)], check=True)
    found = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    products = 2 * 5 * 4 * 16 * 16 * 32  # threads, steps, sums of tiles; of ones
    assert found == f"{2 * products} {products} 1"
