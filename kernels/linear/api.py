"""The public call: checks its arguments, picks the backend."""

from __future__ import annotations

from torch import Tensor

from msformer_kernels.backends import resolve
from msformer_kernels.library import refuse_transforms
from msformer_kernels.linear import ops, reference
from msformer_kernels.validation import check_rank, check_same_kind, check_shape


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
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
        BackendError: the chosen backend cannot be had.
    """
    check_rank("x", x, "[B, N, in]", 3)
    check_same_kind("x", x, {"weight": weight, "bias": bias})
    check_rank("weight", weight, "[out, in]", 2)
    check_shape("weight", weight, (weight.shape[0], x.shape[2]), "[out, in]")
    check_shape("bias", bias, (weight.shape[0],), "[out]")
    chosen = resolve(backend, x.device.type, x.dtype)
    if chosen == "reference":
        return reference.linear(x, weight, bias)
    refuse_transforms("linear")
    return ops.linear(x, weight, bias, chosen)
