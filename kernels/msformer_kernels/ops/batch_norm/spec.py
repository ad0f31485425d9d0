"""The declaration of ``msformer::batch_norm``. The statistics that it returns are for the backward and for running
averages; they are not differentiated."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from msformer_kernels.core.operator import Operator
from msformer_kernels.core.precision import arithmetic_dtype
from msformer_kernels.ops.batch_norm.reference import batch_norm


def _fake(call: Any) -> tuple[Tensor, ...]:
    x, wide = call.x, arithmetic_dtype(call.x.dtype)
    channels = x.shape[2]
    return x.new_empty(x.shape), x.new_empty(channels, dtype=wide), x.new_empty(channels, dtype=wide)


OPERATOR = Operator(
    batch_norm,
    outputs=("output",),
    statistics=("mean", "variance"),
    fake=_fake,
    products=lambda call: 0,
    served_by=("native", "triton"),
    per_image=False,
    wide_parameters=True,  # as torch.nn.BatchNorm2d takes them
)
