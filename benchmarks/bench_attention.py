"""pytest-benchmark: efficient attention, with LayerNorm and residual."""

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import Case
from benchmarks.pytest_support import bench

OPERATIONS = ("attention",)


def test_attention(benchmark: BenchmarkFixture, case: Case, rival: str) -> None:
    bench(benchmark, case, rival)
