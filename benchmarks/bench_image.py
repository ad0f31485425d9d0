"""pytest-benchmark: an image, from the picture to the label map."""

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import Case
from benchmarks.pytest_support import bench

OPERATIONS = ("image",)


def test_image(benchmark: BenchmarkFixture, case: Case, rival: str) -> None:
    bench(benchmark, case, rival)
