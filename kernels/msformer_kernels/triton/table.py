"""With which tiles, warps and pipeline stages each Triton kernel is launched.

A table by class of width, size of an element and architecture, never by the number of tokens.

``MSFORMER_TRITON_TABLE`` names a JSON file whose entries go before those here; `python -m msformer_kernels.tune` writes
one on the GPU it runs on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from msformer_kernels.triton.device import MMA_SYNC, architecture, compile_options

Options = dict[str, int]

# How each kernel is launched, by class of width (the power of two that covers the channels) and bytes of an element:
# tokens of a tile (BN), warps, and stages of the software pipeline. Never by the number of tokens.
TABLE: dict[str, dict[tuple[int, int], Options]] = {
    "attention_reduction": {
        (64, 2): {"BN": 32, "num_warps": 4, "num_stages": 3},
        (64, 4): {"BN": 32, "num_warps": 4, "num_stages": 3},
    },
    "attention_output": {
        (64, 2): {"BN": 64, "num_warps": 4, "num_stages": 3},
        (64, 4): {"BN": 64, "num_warps": 8, "num_stages": 3},
    },
    "attention_query_gradient": {
        (64, 2): {"BN": 32, "num_warps": 4, "num_stages": 3},
        (64, 4): {"BN": 32, "num_warps": 8, "num_stages": 3},
    },
    "key_tokens": {
        (64, 2): {"BN": 64, "BD": 64, "num_warps": 4, "num_stages": 3},
        (64, 4): {"BN": 64, "BD": 64, "num_warps": 4, "num_stages": 2},
        (128, 2): {"BN": 32, "BD": 128, "num_warps": 8, "num_stages": 2},
        (128, 4): {"BN": 32, "BD": 128, "num_warps": 8, "num_stages": 2},
    },
    "self_output": {
        (64, 2): {"BN": 64, "num_warps": 4, "num_stages": 2},
        (64, 4): {"BN": 64, "num_warps": 4, "num_stages": 2},
        (128, 2): {"BN": 64, "num_warps": 4, "num_stages": 2},
        (128, 4): {"BN": 32, "num_warps": 4, "num_stages": 1},
    },
    "query_backward": {
        (64, 2): {"BN": 64, "num_warps": 4, "num_stages": 2},
        (64, 4): {"BN": 16, "num_warps": 4, "num_stages": 2},
        (128, 2): {"BN": 32, "num_warps": 8, "num_stages": 2},
        (128, 4): {"BN": 16, "num_warps": 8, "num_stages": 1},
    },
    "token_backward": {
        (64, 2): {"BN": 64, "BD": 64, "num_warps": 4, "num_stages": 2},
        (64, 4): {"BN": 32, "BD": 32, "num_warps": 4, "num_stages": 2},
        (128, 2): {"BN": 32, "BD": 64, "num_warps": 8, "num_stages": 1},
        (128, 4): {"BN": 16, "BD": 32, "num_warps": 8, "num_stages": 1},
    },
    "weight_gradient": {
        (64, 2): {"BN": 64, "BD": 64, "num_warps": 4, "num_stages": 2},
        (64, 4): {"BN": 32, "BD": 64, "num_warps": 4, "num_stages": 2},
        (128, 2): {"BN": 64, "BD": 64, "num_warps": 4, "num_stages": 2},
        (128, 4): {"BN": 32, "BD": 64, "num_warps": 4, "num_stages": 2},
    },
    # of values a program holds (tile), and features of them where a program need not hold all (BH)
    "activation": {
        (2048, 2): {"tile": 2048, "BH": 64, "num_warps": 4, "num_stages": 1},
        (2048, 4): {"tile": 2048, "BH": 64, "num_warps": 4, "num_stages": 1},
    },
    "activation_backward": {
        (2048, 2): {"tile": 2048, "BH": 64, "num_warps": 8, "num_stages": 1},
        (2048, 4): {"tile": 2048, "BH": 64, "num_warps": 8, "num_stages": 1},
    },
    "convolution_backward": {
        (2048, 2): {"tile": 512, "BH": 64, "num_warps": 4, "num_stages": 1},
        (2048, 4): {"tile": 512, "BH": 64, "num_warps": 4, "num_stages": 1},
    },
}


# where another architecture needs smaller tiles
_ON: dict[tuple[str, str, int, int], Options] = {
    ("sm_80", "attention_output", 64, 2): {"BN": 32, "num_warps": 4, "num_stages": 2},
    ("sm_80", "attention_output", 64, 4): {"BN": 32, "num_warps": 4, "num_stages": 2},
    ("sm_80", "key_tokens", 128, 2): {"BN": 32, "BD": 64, "num_warps": 4, "num_stages": 2},
    ("sm_80", "key_tokens", 128, 4): {"BN": 32, "BD": 64, "num_warps": 4, "num_stages": 2},
    ("sm_80", "query_backward", 128, 2): {"BN": 32, "num_warps": 8, "num_stages": 1},
    ("sm_80", "token_backward", 64, 2): {"BN": 32, "BD": 32, "num_warps": 4, "num_stages": 1},
    ("sm_80", "token_backward", 128, 2): {"BN": 32, "BD": 32, "num_warps": 8, "num_stages": 1},
    ("sm_120", "self_output", 128, 2): {"BN": 64, "num_warps": 8, "num_stages": 2},
    ("sm_100", "key_tokens", 64, 2): {"BN": 32, "BD": 64, "num_warps": 4, "num_stages": 2},
    ("sm_100", "key_tokens", 64, 4): {"BN": 32, "BD": 64, "num_warps": 4, "num_stages": 2},
    ("sm_100", "self_output", 128, 2): {"BN": 64, "num_warps": 8, "num_stages": 2},
    ("sm_100", "token_backward", 64, 2): {"BN": 64, "BD": 64, "num_warps": 8, "num_stages": 1},
    ("gfx942", "key_tokens", 128, 2): {"BN": 32, "BD": 64, "num_warps": 4, "num_stages": 2},
    ("gfx942", "token_backward", 64, 2): {"BN": 64, "BD": 32, "num_warps": 4, "num_stages": 1},
    ("gfx942", "token_backward", 128, 2): {"BN": 64, "BD": 32, "num_warps": 4, "num_stages": 1},
    ("gfx942", "query_backward", 128, 2): {"BN": 16, "num_warps": 4, "num_stages": 1},
}

_LIKE = {"sm_89": "sm_80", MMA_SYNC: "sm_80", "sm_120": "sm_80"}
"""Whose entries an architecture takes where it has none of its own."""


def entry_name(architecture: str, kernel: str, limit: int, size: int) -> str:
    """How a table in a file names an entry, such as ``sm_90/key_tokens/128/2``."""
    return f"{architecture}/{kernel}/{limit}/{size}"


_trials: dict[str, Options] = {}


@contextmanager
def trial(name: str, options: Options) -> Iterator[None]:
    """Within the block the entry of this name (see `entry_name`) is `options`."""
    _trials[name] = options
    try:
        yield
    finally:
        del _trials[name]


@lru_cache
def _from_file(path: str) -> dict[str, Options]:
    """The entries of a file that `python -m msformer_kernels.tune` wrote.

    Raises ValueError where it is not such a file.
    """
    try:
        entries = json.loads(Path(path).read_text())["entries"]
        return {str(name): {k: int(v) for k, v in options.items()} for name, options in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"MSFORMER_TRITON_TABLE: {path} is not a table of launch options: {error}") from error


def limit_of(kernel: str, width: int) -> int:
    """The class of a width: the smallest in the table that holds it, else the largest."""
    limits = sorted({limit for limit, _ in TABLE[kernel]})
    return next((limit for limit in limits if width <= limit), limits[-1])


def table_entry(kernel: str, width: int, like: Tensor) -> Options:
    """Tile sizes, warps and stages of a kernel for this many channels and the dtype of `like`."""
    limit, size, here = limit_of(kernel, width), like.element_size(), architecture()
    path = os.environ.get("MSFORMER_TRITON_TABLE")
    options = None
    if path or _trials:
        entry = entry_name(here, kernel, limit, size)
        options = _trials.get(entry) or (_from_file(path).get(entry) if path else None)
    for name in (here, _LIKE.get(here, here)):
        options = options or _ON.get((name, kernel, limit, size))
    return dict(options or TABLE[kernel][limit, size])


def launch_options(kernel: str, width: int, like: Tensor) -> dict[str, Any]:
    """`table_entry`, and how every kernel is compiled."""
    return compile_options() | table_entry(kernel, width, like)
