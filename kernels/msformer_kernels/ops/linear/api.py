"""The public function; its body is the check of its arguments (see `Operator.public`)."""

from __future__ import annotations

from torch import Tensor

from msformer_kernels.core.validation import check_rank, check_shape
from msformer_kernels.ops.linear.spec import OPERATOR


@OPERATOR.public
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> None:
    """``x W^T + b`` of tokens, as `torch.nn.functional.linear`, for matrices with one side much longer than the others.

    Args:
        x: tokens ``[B, N, in]``, floating point, any strides.
        weight: ``[out, in]``.
        bias: ``[out]`` or None.
        backend: see `msformer_kernels.use_backend`.

    Returns:
        ``[B, N, out]`` in x's dtype (under autocast in autocast's). Sums are kept in float32 (float64 for float64).

    Raises:
        ValueError: shapes or devices that do not fit, an unknown backend.
        TypeError: dtypes that are mixed (outside autocast) or not floating point.
        BackendError: the chosen backend is not available for the call.
    """
    check_rank("x", x, "[B, N, in]", 3)
    check_rank("weight", weight, "[out, in]", 2)
    check_shape("weight", weight, (weight.shape[0], x.shape[2]), "[out, in]")
    check_shape("bias", bias, (weight.shape[0],), "[out]")
