"""What an installed package must do, wherever it is: a layer gives the results of the reference, and says what ran.

    python tests/installed.py [reference]

With `reference` there must be no compiled kernels, and the first call must say so in one warning.
"""

from __future__ import annotations

import platform
import sys
import warnings
from pathlib import Path

import torch

import msformer_kernels as kernels


def main() -> None:
    folder = Path(kernels.__file__).parent
    assert not folder.is_relative_to(Path(__file__).resolve().parents[1] / "kernels"), "this is no installed package"
    torch.manual_seed(0)
    layer, x = kernels.MixFFN(32, 128), torch.randn(2, 24 * 20, 32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer(x, 24, 20)
        found = layer(x, 24, 20)
    with kernels.use_backend("reference"):
        expected = layer(x, 24, 20)
    difference = (found - expected).abs().max().item()
    assert difference < 1e-5, f"largest difference to the reference: {difference}"
    said = [str(w.message) for w in caught if "msformer" in str(w.message)]
    explanation = kernels.explain()
    wanted = "reference" if sys.argv[1:] == ["reference"] else "native"
    if sys.platform == "win32":
        wanted = "reference"
    assert explanation.chosen == wanted, explanation
    assert len(said) == (wanted == "reference"), said
    print(f"CPython {platform.python_version()}, torch {torch.__version__}, msformer {kernels.__version__}: {wanted}")
    print(f"  native: {explanation.reasons['native']}")
    if wanted == "native":
        from msformer_kernels import _native

        print(f"  threads: {_native.thread_library()}")
    print(*(f"  warning: {message}" for message in said), sep="\n", end="\n" if said else "")
    print(f"  largest difference to the reference: {difference:.1e}")


if __name__ == "__main__":
    main()
