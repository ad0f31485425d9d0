"""pytest-benchmark: MixFFN and MixFFN-skip, with LayerNorm and residual."""

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import Case
from benchmarks.pytest_support import bench

OPERATIONS = ("mix_ffn", "mix_ffn_skip")


def test_mix_ffn(benchmark: BenchmarkFixture, case: Case, rival: str) -> None:
    bench(benchmark, case, rival)
