"""The declaration of ``msformer::mix_ffn``. The backward needs nothing but the inputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from msformer_kernels.core.operator import Operator
from msformer_kernels.core.registration import cast_output
from msformer_kernels.ops.mix_ffn.reference import mix_ffn


def _fake(call: Any) -> tuple[Tensor, ...]:
    return (call.x.new_empty(call.x.shape),)


OPERATOR = Operator(
    mix_ffn,
    outputs=("output",),
    fake=_fake,
    served_by=("native", "cuda", "triton"),
    autocast=cast_output,
)
