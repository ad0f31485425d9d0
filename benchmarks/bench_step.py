"""pytest-benchmark: one fitting step of MS-Former."""

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import Case
from benchmarks.pytest_support import bench

OPERATIONS = ("step",)


def test_step(benchmark: BenchmarkFixture, case: Case, rival: str) -> None:
    bench(benchmark, case, rival)
