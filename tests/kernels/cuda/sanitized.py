"""Runs operators in an emulation that was built with sanitizers, which end the process where they find something.

    python -m tests.kernels.cuda.sanitized MODULE.so (operators | beyond)

`operators` calls every operator that has CUDA kernels, forward and backward; `beyond` makes them read beyond a tensor.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location

import numpy as np
import torch

NAME = "msformer_kernels._cuda_emulated"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def load(path: str) -> None:
    """The module at the path as that of the package, which is imported afterwards."""
    spec = spec_from_file_location(NAME, path, loader=ExtensionFileLoader(NAME, path))
    assert spec is not None
    assert spec.loader is not None
    sys.modules[NAME] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[NAME])


def run_operators() -> None:
    """Prints each case; with tf32, too, where that makes a difference."""
    from msformer_kernels.core.operator import OPERATORS
    from msformer_kernels.core.precision import float32_products
    from tests.kernels.cases import cast, run

    for name, operator in OPERATORS.items():
        if "cuda" not in operator.served_by:
            continue
        cases = import_module(f"tests.kernels.cases.{name}").CASES.small
        for dtype, precision in (*((dtype, "highest") for dtype in DTYPES), (torch.float32, "high")):
            for case in cases:
                if dtype == torch.float16 and case not in cases[::3]:  # it takes the same way as bfloat16
                    continue
                with float32_products(precision):
                    run(case, cast(case.draw(), dtype), "cuda")
                print(name, case, dtype, "tf32" if precision == "high" else "")


def read_beyond_a_tensor() -> None:
    """By way of NumPy, which lets a tensor be larger than its memory."""
    import msformer_kernels as kernels

    rows, channels = 8, 16
    memory = np.zeros((rows - 1, channels), np.float32)
    x = torch.from_numpy(np.lib.stride_tricks.as_strided(memory, (1, rows, channels)))
    weight = torch.zeros(channels, channels)
    kernels.mix_ffn(x, rows, 1, weight, None, torch.zeros(channels, 1, 3, 3), None, weight, None, backend="cuda")


if __name__ == "__main__":
    load(sys.argv[1])
    {"operators": run_operators, "beyond": read_beyond_a_tensor}[sys.argv[2]]()
