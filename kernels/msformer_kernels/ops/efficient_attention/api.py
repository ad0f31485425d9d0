"""The public function; its body is the check of its arguments (see `Operator.public`)."""

from __future__ import annotations

from torch import Tensor

from msformer_kernels.core.validation import check_mask, check_memory, check_rank, check_shape
from msformer_kernels.ops.efficient_attention.reference import NORMALIZATIONS
from msformer_kernels.ops.efficient_attention.spec import OPERATOR

LEAST_EPS = 1e-30
"""Its reciprocal is finite in float32, and so are gradients in which it is a factor."""


@OPERATOR.public
def efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    memory_key: Tensor | None = None,
    memory_value: Tensor | None = None,
    query_scale: float = 1.0,
    key_scale: float = 1.0,
    output_scale: float = 1.0,
    normalize_query: bool = True,
    normalization: str = "softmax",
    eps: float = 1e-15,
    backend: str | None = None,
) -> None:
    """Attention in time and memory linear in the number of tokens: ``output_scale * rho_q(Q) (rho_k(K)^T V)``.

    Shen et al., "Efficient Attention: Attention with Linear Complexities", WACV 2021; with ``normalization="relu"`` the
    linear attention of EfficientViT (Cai et al., ICCV 2023) and SANA.

    Args:
        query: ``[B, heads, Nq, Dk]``, floating point, any strides.
        key: ``[B, heads, N, Dk]``.
        value: ``[B, heads, N, Dv]``.
        mask: boolean ``[B, N]``, True keeps a key token. A masked token contributes nothing, whatever it holds: the
            result is that of the tokens that are left. Where none is left the context is zero.
        memory_key: ``[heads, M, Dk]``: keys in front of those of every image, as diffusion models learn them; they are
            never masked, and count as tokens. In the dtype of the others, or float32. Only with `memory_value`.
        memory_value: ``[heads, M, Dv]``.
        query_scale: multiplies the query before its normalisation.
        key_scale: multiplies the key before its normalisation.
        output_scale: multiplies the output, not the context.
        normalize_query: False leaves the (scaled) query as it is; with ``"relu"`` it is its ReLU, divided by nothing.
        normalization: ``"softmax"``: the query over its features, the key over its tokens. ``"scaling"``: both divided
            by the square root of the number of key tokens that are kept. ``"relu"``: the ReLU of both, and the query
            divided by ``relu(Q) . sum_n relu(K_n) + eps``; it gives zeros where it has no positive feature, or meets no
            positive key.
        eps: of ``"relu"`` with `normalize_query`, at least 1e-30, so that nothing is divided by zero. EfficientViT and
            SANA have 1e-15, timm 1e-5. The other normalisations do not use it.
        backend: see `msformer_kernels.use_backend`.

    Returns:
        output ``[B, heads, Nq, Dv]`` in the input dtype (under autocast in its dtype), and the global context
        ``rho_k(K)^T V`` ``[B, heads, Dk, Dv]``, a statistic over all tokens and so kept in float32 (float64 for float64
        inputs). Both are differentiable. A batch, query or key of size 0 gives empty outputs, zero contexts.

    Raises:
        ValueError: shapes or devices that do not fit, an unknown normalization or backend, an eps that is too small.
        TypeError: dtypes that are mixed or not floating point, a mask that is not boolean.
        BackendError: the chosen backend is not available for the call.
    """
    check_rank("query", query, "[B, heads, Nq, Dk]", 4)
    check_rank("key", key, "[B, heads, N, Dk]", 4)
    check_rank("value", value, "[B, heads, N, Dv]", 4)
    batch, heads, _, channels = query.shape
    tokens = key.shape[2]
    check_shape("key", key, (batch, heads, tokens, channels), "[B, heads, N, Dk] of the query")
    check_shape("value", value, (batch, heads, tokens, value.shape[3]), "[B, heads, N, Dv] of the key")
    check_mask(mask, batch, tokens, query.device)
    check_memory(memory_key, memory_value, heads, channels, value.shape[3])
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization: expected one of {', '.join(NORMALIZATIONS)}, got {normalization!r}")
    if normalization == "relu" and not eps >= LEAST_EPS:
        raise ValueError(f"eps: expected at least {LEAST_EPS:g} with normalization 'relu', got {eps}")
