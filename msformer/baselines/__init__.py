"""Methods that turn one image into a label map without labels, side by side: MS-Former, and what it is compared with.

A method is a file in this folder that defines ``METHODS``, a list of `Method`; adding one is adding a file. All take
the same image, ``[3, h, w]`` float32 in [0, 1], and a seed, and return an integer label map ``[h, w]``.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Task:
    """What a method is given."""

    image: Tensor
    """``[3, h, w]``, float32 in [0, 1], on the CPU."""
    colour: bool
    """False where the three channels are the same grey image."""
    seed: int
    device: torch.device
    report: Callable[[int, int], None] = lambda done, steps: None
    """To be called as ``report(done, steps)`` by methods that take steps; it may raise to end the run."""


@dataclass(frozen=True)
class LabelMap:
    """What a method returns."""

    labels: NDArray[np.integer]
    """``[h, w]``, integers from 0."""
    steps: int = 0
    """Steps of optimisation taken."""
    mask: NDArray[np.bool_] | None = None
    """The object ``[h, w]``, from methods that know it; of the others, a rule chooses labels."""


@dataclass(frozen=True)
class Method:
    """A way to a label map."""

    name: str
    """As on the command line: lower case, words joined by hyphens."""
    title: str
    """As in a table."""
    order: int
    """Its place in tables: floors first, MS-Former last."""
    label_map: Callable[[Task], LabelMap]
    tables: tuple[int, ...] = (1,)
    """Tables of the paper it stands in: 1 compares methods, 2 leaves losses out. Empty: run by name only."""
    settings: str = ""
    """What else decides its result, in words: label maps that were made with another are made anew."""


@cache
def all_methods() -> tuple[Method, ...]:
    """The methods of all files in this folder, in their order."""
    found: list[Method] = []
    for module in pkgutil.iter_modules(__path__):
        found += getattr(import_module(f"{__name__}.{module.name}"), "METHODS", [])
    names = [method.name for method in found]
    if len(set(names)) != len(names):
        raise RuntimeError(f"two methods have the same name: {', '.join(sorted(names))}")
    return tuple(sorted(found, key=lambda method: (method.order, method.name)))


def choose_methods(names: Sequence[str], ablation: bool = False) -> tuple[Method, ...]:
    """The methods of these names, in their order; ``"all"`` are those of table 1, or with `ablation` of table 2.

    Raises:
        ValueError: an unknown name.
    """
    methods = all_methods()
    table = [method.name for method in methods if (2 if ablation else 1) in method.tables]
    known = {"all": table} | {method.name: [method.name] for method in methods}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"methods: unknown {', '.join(map(repr, unknown))}; expected some of {', '.join(known)}, "
            "or the folder of a trained model"
        )
    chosen = {each for name in names for each in known[name]}
    return tuple(method for method in methods if method.name in chosen)
