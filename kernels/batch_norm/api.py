"""The public call: checks its arguments, picks the backend."""

from __future__ import annotations

from torch import Tensor

from msformer_kernels.backends import resolve
from msformer_kernels.batch_norm import ops, reference
from msformer_kernels.library import refuse_transforms
from msformer_kernels.validation import check_rank, check_same_kind, check_shape


def check_arguments(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    check_rank("x", x, "[B, N, C]", 3)
    check_same_kind("x", x, {"weight": weight, "bias": bias})
    if x.shape[0] * x.shape[1] < 2:
        raise ValueError(f"x: expected at least 2 tokens in all, to normalise over, got shape {tuple(x.shape)}")
    check_shape("weight", weight, (x.shape[2],), "[C]")
    check_shape("bias", bias, (x.shape[2],), "[C]")


def batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm of tokens in training mode (Ioffe, Szegedy, ICML 2015): each channel over all tokens of the batch.

    Args:
        x: tokens ``[B, N, C]``, floating point, any strides, at least two in all.
        weight, bias: ``[C]`` or None.
        eps: added to the variance.
        backend: see `msformer_kernels.use_backend`.

    Returns:
        output ``[B, N, C]`` in x's dtype, and the mean and (biased) variance ``[C]`` that were used, in float32
        (float64 for float64); gradients flow through the output only.

    Raises:
        ValueError: fewer than two tokens, shapes or devices that do not fit, an unknown backend.
        TypeError: dtypes that are mixed (outside autocast) or not floating point.
        BackendError: the chosen backend cannot be had.
    """
    check_arguments(x, weight, bias)
    chosen = resolve(backend, x.device.type, x.dtype)
    if chosen == "reference":
        return reference.batch_norm(x, weight, bias, eps)
    refuse_transforms("batch_norm")
    output, mean, variance = ops.batch_norm(x, weight, bias, eps, chosen)
    return output, mean.detach(), variance.detach()
