"""Small images, and settings that make a fit take a moment."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import msformer_kernels as kernels

# those whose kernels are not interpreted or emulated
FAST_BACKENDS = [name for name in kernels.available_backends() if name not in ("triton", "cuda")]
QUICK: dict[str, Any] = {"size": 33, "max_steps": 3, "embed_dim": 6, "depth": 1}
QUICK_OPTIONS = ["--size", "33", "--max-steps", "2", "--embed-dim", "6", "--depth", "1"]


@pytest.fixture
def picture() -> NDArray[np.uint8]:
    """48 x 40 colour noise with a dark disc."""
    random = np.random.default_rng(0)
    image = random.integers(150, 220, (48, 40, 3))
    rows, columns = np.mgrid[:48, :40]
    image[(rows - 22) ** 2 + (columns - 20) ** 2 < 120] -= 120
    return image.astype(np.uint8)
