"""The examples as a user starts them, and the small sizes that tests start them with."""

from __future__ import annotations

import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]

SMALL = {
    "unet_organs": ["--steps", "25", "--size", "32"],
    "segformer_patched": ["--size", "64"],
    "ct_volume": ["--slices", "2", "--size", "33", "--max-steps", "2"],
}
"""Options of tests, by example."""


def command(name: str, *options: str) -> list[str]:
    """The command of an example, as its head and examples/README.md say it."""
    start = TORCHRUN if name == "distributed" else []
    return [sys.executable, *start, str(EXAMPLES / f"{name}.py"), *options]


def scripts() -> list[str]:
    """Names of the examples that are scripts."""
    return sorted(path.stem for path in EXAMPLES.glob("*.py"))
