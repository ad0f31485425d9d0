"""The package as a whole: its version and its public names."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest

import msformer_kernels as kernels


def test_public_names_exist() -> None:
    assert all(hasattr(kernels, name) for name in kernels.__all__)


def test_version_is_that_of_the_distribution() -> None:
    try:
        expected = version("msformer")
    except PackageNotFoundError:
        expected = "0.0.0+unknown"
    assert kernels.__version__ == expected


@pytest.fixture(scope="module")
def fresh() -> dict[str, str]:
    """What a process finds that imports the kernels alone, by the test that asks."""
    code = """
import sys, torch
before = {*sys.modules}
import msformer_kernels
early = "msformer_kernels.patching" in sys.modules
x = torch.rand(2, 3)
msformer_kernels.linear(x[None], x)
new = {*sys.modules} - before
print("imports", early, *{name.partition(".")[0] for name in new} - sys.stdlib_module_names - {"torch"},
      *new & {"torch._dynamo"})

first = msformer_kernels.patch
from msformer_kernels import patch
import msformer_kernels.patch
print("patch", first is patch is msformer_kernels.patch, callable(patch), hasattr(msformer_kernels, "nothing"))

from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    msformer_kernels.linear(torch.rand(1, 5, 3), torch.rand(2, 3))
print("flops", counter.get_total_flops())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = (line.partition(" ") for line in done.stdout.splitlines())
    return {test: found for test, _, found in lines}


def test_an_import_and_a_call_import_nothing_else(fresh: dict[str, str]) -> None:
    """Neither the model nor a compiler, which take a second, nor `patch`, which is half of the package."""
    assert fresh["imports"] == "False msformer_kernels"


def test_patch_is_there_in_every_way_of_importing_it(fresh: dict[str, str]) -> None:
    assert fresh["patch"] == "True True False"


def test_a_counter_that_is_imported_later_knows_the_operators(fresh: dict[str, str]) -> None:
    assert fresh["flops"] == "60"
