"""The declaration of ``msformer::linear``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from msformer_kernels.core.operator import Operator
from msformer_kernels.core.registration import cast_output
from msformer_kernels.ops.linear.reference import linear


def _fake(call: Any) -> tuple[Tensor, ...]:
    return (call.x.new_empty(*call.x.shape[:2], call.weight.shape[0]),)


OPERATOR = Operator(
    linear,
    outputs=("output",),
    fake=_fake,
    products=lambda call: call.x.shape[:2].numel() * call.weight.numel(),
    # on a GPU the vendor's matrix products are hard to beat, and the reference has them
    served_by=("native",),
    matrices=("weight",),
    skippable=("x",),
    autocast=cast_output,
)
