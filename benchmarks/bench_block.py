"""pytest-benchmark: the transformer block: efficient attention, then MixFFN-skip."""

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import Case
from benchmarks.pytest_support import bench

OPERATIONS = ("block",)


def test_block(benchmark: BenchmarkFixture, case: Case, rival: str) -> None:
    bench(benchmark, case, rival)
