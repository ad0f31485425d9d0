"""Is a result right? Compared with the exact form, the clean one in float64, before anything is timed.

The error of an output or a gradient is its largest difference, relative to its largest exact value. Two exceptions:
gradients that cancel to nearly nothing are rounding and no more, as that of the key bias is, so none is measured by
less than a hundredth of the largest gradient of a parameter. And in bfloat16, and of the whole model, the gradients of
all parameters count as one vector, by its Euclidean norm. In the model many of them cancel, those of every bias before
a BatchNorm. And under autocast PyTorch sums the gradients of a LayerNorm's weight and bias over tokens with errors of
12 % at 129 x 129 tokens, and that is what its users get. In bfloat16 that vector may be off by more than the outputs:
in a fitting step, the rounding already changes which label some pixels have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = {"float32": 1e-3, "bfloat16": 6e-2}
JOINED_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}
SMALLEST_SCALE = 1e-2
_GRADIENT, _JOINED = "grad.", "parameter gradients"


@dataclass(frozen=True)
class Deviation:
    """The error that is the worst for what is allowed, the result it is in, and what is allowed there."""

    error: float
    where: str
    allowed: float

    @property
    def is_right(self) -> bool:
        return self.error <= self.allowed  # NaN is not


def deviation(found: dict[str, Tensor], exact: dict[str, Tensor], dtype: str, joined: bool) -> Deviation:
    """Of a rival's results from the exact ones; NaN where they are NaN.

    `joined` takes the gradients of all parameters as one vector.

    Raises:
        ValueError: results that are missing, or of another shape.
    """
    if found.keys() != exact.keys():
        raise ValueError(f"results: expected {', '.join(exact)}, got {', '.join(found)}")
    for name, value in exact.items():
        if found[name].shape != value.shape:
            raise ValueError(f"{name}: expected shape {tuple(value.shape)}, got {tuple(found[name].shape)}")
    gradients = [name for name in exact if name.startswith(_GRADIENT)]
    floor = SMALLEST_SCALE * max((_largest(exact[name]) for name in gradients), default=0.0)
    errors = {
        name: _ratio(_largest(found[name].double() - value), max(_largest(value), floor if name in gradients else 0.0))
        for name, value in exact.items()
        if not joined or name not in gradients
    }
    if joined and gradients:
        differences = [(found[name].double() - exact[name]).flatten() for name in gradients]
        norm = torch.cat([exact[name].flatten() for name in gradients]).norm().item()
        errors[_JOINED] = _ratio(torch.cat(differences).norm().item(), norm)
    deviations = [
        Deviation(error, name, (JOINED_TOLERANCE if name == _JOINED else TOLERANCE)[dtype])
        for name, error in errors.items()
    ]
    return max(deviations, key=lambda found: math.inf if math.isnan(found.error) else found.error / found.allowed)


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _ratio(difference: float, scale: float) -> float:
    if difference == 0:
        return 0.0
    return difference / scale if scale else math.inf
