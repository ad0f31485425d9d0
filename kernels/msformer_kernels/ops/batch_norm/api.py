"""The public function; its body is the check of its arguments (see `Operator.public`)."""

from __future__ import annotations

from torch import Tensor

from msformer_kernels.core.validation import check_rank, check_shape
from msformer_kernels.ops.batch_norm.spec import OPERATOR


@OPERATOR.public
def batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    backend: str | None = None,
) -> None:
    """BatchNorm of tokens in training mode (Ioffe, Szegedy, ICML 2015): each channel over all tokens of the batch.

    Args:
        x: tokens ``[B, N, C]``, floating point, any strides, at least two in all.
        weight, bias: ``[C]`` or None, in x's dtype; beside bfloat16 and float16 also in float32.
        eps: added to the variance.
        backend: see `msformer_kernels.use_backend`.

    Returns:
        output ``[B, N, C]`` in x's dtype, and the mean and (biased) variance ``[C]`` that were used, in float32
        (float64 for float64); gradients flow through the output only.

    Raises:
        ValueError: fewer than two tokens, shapes or devices that do not fit, an unknown backend.
        TypeError: dtypes that are mixed (outside autocast) or not floating point.
        BackendError: the chosen backend is not available for the call.
    """
    check_rank("x", x, "[B, N, C]", 3)
    if x.shape[0] * x.shape[1] < 2:
        raise ValueError(f"x: expected at least 2 tokens in all, to normalise over, got shape {tuple(x.shape)}")
    check_shape("weight", weight, (x.shape[2],), "[C]")
    check_shape("bias", bias, (x.shape[2],), "[C]")
