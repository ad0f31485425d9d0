"""The public function; its body is the check of its arguments (see `Operator.public`)."""

from __future__ import annotations

from torch import Tensor

from msformer_kernels.core.validation import (
    check_heads,
    check_mask,
    check_memory,
    check_norm,
    check_rank,
    check_shape,
)
from msformer_kernels.ops.efficient_self_attention.spec import OPERATOR
from msformer_kernels.ops.layer_norm import NORMS


@OPERATOR.public
def efficient_self_attention(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor | None,
    key_weight: Tensor,
    key_bias: Tensor | None,
    value_weight: Tensor,
    value_bias: Tensor | None,
    output_weight: Tensor,
    output_bias: Tensor | None,
    *,
    num_heads: int = 1,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    norm_kind: str = "layer",
    residual: bool = False,
    mask: Tensor | None = None,
    memory_key: Tensor | None = None,
    memory_value: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Efficient attention of tokens with themselves: ``[x +] W_o(efficient_attention(W_q y, W_k y, W_v y))`` with y = x
    or LayerNorm(x).

    Shen et al., "Efficient Attention: Attention with Linear Complexities", WACV 2021. The compiled backends compute a
    folded form (exact: the softmax over tokens cancels the key bias and lets the value projection be applied after the
    reduction over tokens) in two passes over x; queries, keys and values are never written to memory, and the backward
    saves x and a few ``Dk x C`` matrices.

    Args:
        x: tokens ``[B, N, C]``, floating point, any strides.
        query_weight, key_weight: ``[Dk, C]``, as in `torch.nn.Linear`.
        value_weight: ``[Dv, C]``.
        output_weight: ``[C, Dv]``.
        query_bias, key_bias, value_bias, output_bias: of matching size, or None.
        num_heads: divides Dk and Dv; head h takes the h-th slice of each.
        norm_weight, norm_bias: ``[C]``; a norm of x before the projections, unless norm_weight is None.
        norm_eps: of that LayerNorm.
        norm_kind: ``"layer"``, or ``"rms"`` for RMSNorm: about zero instead of the mean (Zhang and Sennrich, 2019).
        residual: adds x (before the norm) to the output.
        mask: boolean ``[B, N]``, True keeps a token as a key. Masked tokens still get an output.
        memory_key: ``[heads, M, Dk / heads]``: keys in front of those of every image, as diffusion models learn them;
            they are never masked. Only with `memory_value`, and without `key_bias`.
        memory_value: ``[heads, M, Dv / heads]``.
        backend: see `msformer_kernels.use_backend`. RMSNorm and memory tokens have kernels on CPUs alone.

    Returns:
        output ``[B, N, C]`` in x's dtype (under autocast in autocast's, unless residual), channel by channel where x
        lies so (as an image with channels first), and the global context
        ``[B, heads, Dk / heads, Dv / heads]``, a statistic over all tokens and so kept in float32 (float64 for
        float64). Both are differentiable. A batch or sequence of size 0 gives an empty output, zero context and zero
        gradients.

    Raises:
        ValueError: shapes or devices that do not fit, heads that do not divide, an unknown backend.
        TypeError: dtypes that are mixed (outside autocast) or not floating point, a mask that is not boolean.
        BackendError: the chosen backend is not available for the call.
    """
    check_rank("x", x, "[B, N, C]", 3)
    batch, tokens, channels = x.shape
    key_channels, value_channels = query_weight.shape[0], value_weight.shape[0]
    check_shape("query_weight", query_weight, (key_channels, channels), "[Dk, C]")
    check_shape("query_bias", query_bias, (key_channels,), "[Dk]")
    check_shape("key_weight", key_weight, (key_channels, channels), "[Dk, C]")
    check_shape("key_bias", key_bias, (key_channels,), "[Dk]")
    check_shape("value_weight", value_weight, (value_channels, channels), "[Dv, C]")
    check_shape("value_bias", value_bias, (value_channels,), "[Dv]")
    check_shape("output_weight", output_weight, (channels, value_channels), "[C, Dv]")
    check_shape("output_bias", output_bias, (channels,), "[C]")
    check_heads(num_heads, Dk=key_channels, Dv=value_channels)
    check_norm("norm", norm_weight, norm_bias, channels)
    if norm_kind not in NORMS:
        raise ValueError(f"norm_kind: expected one of {', '.join(NORMS)}, got {norm_kind!r}")
    check_mask(mask, batch, tokens, x.device)
    check_memory(memory_key, memory_value, num_heads, key_channels // num_heads, value_channels // num_heads)
    if memory_key is not None and key_bias is not None:
        raise ValueError(
            "key_bias: expected None beside memory_key; subtract it from the memory keys, which is the same"
        )
