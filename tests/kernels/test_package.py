"""The package as a whole: its version and its public names."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import msformer_kernels as kernels


def test_public_names_exist() -> None:
    assert all(hasattr(kernels, name) for name in kernels.__all__)


def test_version_is_that_of_the_distribution() -> None:
    try:
        expected = version("msformer")
    except PackageNotFoundError:
        expected = "0.0.0+unknown"
    assert kernels.__version__ == expected


def test_operators_import_neither_the_model_nor_the_compiler() -> None:
    """TorchDynamo would take a second."""
    code = "import sys, msformer_kernels; print({'msformer', 'torch._dynamo'} & {*sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
