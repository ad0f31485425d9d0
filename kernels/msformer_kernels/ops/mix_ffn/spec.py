"""The declaration of ``msformer::mix_ffn``. The backward needs nothing but the inputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from msformer_kernels.core.operator import Operator
from msformer_kernels.core.registration import cast_output
from msformer_kernels.ops.mix_ffn.reference import mix_ffn

_MOST_COLUMNS = 65535


def _fake(call: Any) -> tuple[Tensor, ...]:
    return (call.x.new_empty(call.x.shape),)


def _too_wide(call: Any) -> str | None:
    """The columns of an image are a dimension of the launch grid, and CUDA has no more than that there."""
    return None if call.width <= _MOST_COLUMNS else f"width is {call.width}, its kernels take at most {_MOST_COLUMNS}"


OPERATOR = Operator(
    mix_ffn,
    outputs=("output",),
    fake=_fake,
    served_by=("native", "cuda", "triton"),
    autocast=cast_output,
    limits={"triton": _too_wide},
)
