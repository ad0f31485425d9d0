"""The layer over `efficient_self_attention`, with the parameters of the published implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from msformer_kernels.core.validation import check_heads, check_positive, check_rank
from msformer_kernels.nn.checkpoints import accept_other_shapes
from msformer_kernels.nn.honest import (
    LayerExplanation,
    Parts,
    built_here,
    convolved,
    explained,
    weight_and_bias,
    why_not_fused,
    why_pointwise,
)
from msformer_kernels.nn.norm import norm_arguments, why_norm_is_called
from msformer_kernels.ops.efficient_attention.api import efficient_attention
from msformer_kernels.ops.efficient_self_attention.api import efficient_self_attention


@built_here
class EfficientAttention(nn.Module):
    """Efficient attention with its projections (Shen et al., WACV 2021).

    Args:
        in_channels: C, of the input and the output.
        key_channels: Dk of all heads together; C by default.
        value_channels: Dv of all heads together; C by default.
        num_heads: must divide Dk and Dv.

    The parameters are those of the published code: 1x1 convolutions `queries`, `keys`, `values` and `reprojection`,
    with bias. The bias of the keys has no effect (the softmax over tokens cancels it); it is there for the checkpoints,
    and its gradient is zero.

    Raises:
        ValueError: channels below 1, a head count that does not divide.
    """

    def __init__(
        self,
        in_channels: int,
        key_channels: int | None = None,
        value_channels: int | None = None,
        num_heads: int = 1,
    ) -> None:
        super().__init__()
        key_channels = in_channels if key_channels is None else key_channels
        value_channels = in_channels if value_channels is None else value_channels
        check_positive(in_channels=in_channels, key_channels=key_channels, value_channels=value_channels)
        check_heads(num_heads, key_channels=key_channels, value_channels=value_channels)
        self.num_heads = num_heads
        self.keys = nn.Conv2d(in_channels, key_channels, 1)
        self.queries = nn.Conv2d(in_channels, key_channels, 1)
        self.values = nn.Conv2d(in_channels, value_channels, 1)
        self.reprojection = nn.Conv2d(value_channels, in_channels, 1)
        self.register_load_state_dict_pre_hook(accept_other_shapes)

    def forward(
        self,
        x: Tensor,
        *,
        norm: nn.Module | None = None,
        residual: bool = False,
        mask: Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Output and context of tokens or of an image.

        Args:
            x: tokens ``[B, N, C]``, or an image ``[B, C, H, W]`` (channels-last without a copy).
            norm: a module to apply to the tokens first; a plain LayerNorm is fused in.
            residual: adds x to the output.
            mask: boolean ``[B, N]``, True keeps a token as a key.
            size: height and width of the image that tokens are of. Only modules that have replaced the projections
                may see it: they are called with ``[B, C, height, width]``, or ``[B, C, N, 1]`` if it is not given.

        Returns:
            output, shaped like x, and context ``[B, heads, Dk / heads, Dv / heads]``.
        """
        if x.dim() == 4:
            size = (x.shape[2], x.shape[3])
            output, context = self._of_tokens(x.flatten(2).transpose(1, 2), norm, residual, mask, size)
            return output.transpose(1, 2).unflatten(2, size), context
        return self._of_tokens(x, norm, residual, mask, size)

    def _of_tokens(
        self,
        x: Tensor,
        norm: nn.Module | None,
        residual: bool,
        mask: Tensor | None,
        size: tuple[int, int] | None,
    ) -> tuple[Tensor, Tensor]:
        if why_norm_is_called(norm, x) is not None:
            assert norm is not None
            output, context = self._of_tokens(norm(x), None, False, mask, size)
            return x + output if residual else output, context
        if why_not_fused(self._parts()) is not None:
            return self._by_parts(x, norm, residual, mask, size)
        modules: dict[str, Any] = self._modules
        query_weight, query_bias = weight_and_bias(modules["queries"])
        key_weight, key_bias = weight_and_bias(modules["keys"])
        value_weight, value_bias = weight_and_bias(modules["values"])
        output_weight, output_bias = weight_and_bias(modules["reprojection"])
        norm_weight, norm_bias, norm_eps = norm_arguments(norm, x.shape[-1], x)  # type: ignore[arg-type]
        return efficient_self_attention(
            x,
            query_weight.flatten(1),
            query_bias,
            key_weight.flatten(1),
            key_bias,
            value_weight.flatten(1),
            value_bias,
            output_weight.flatten(1),
            output_bias,
            num_heads=self.num_heads,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            norm_eps=norm_eps,
            residual=residual,
            mask=mask,
        )

    def _parts(self) -> Parts:
        modules = self._modules
        return (
            ("queries", modules.get("queries"), why_pointwise),
            ("keys", modules.get("keys"), why_pointwise),
            ("values", modules.get("values"), why_pointwise),
            ("reprojection", modules.get("reprojection"), why_pointwise),
        )

    def _by_parts(
        self,
        x: Tensor,
        norm: nn.Module | None,
        residual: bool,
        mask: Tensor | None,
        size: tuple[int, int] | None,
    ) -> tuple[Tensor, Tensor]:
        """`forward` of tokens that calls every submodule."""
        check_rank("x", x, "[B, N, C]", 3)
        size = (x.shape[1], 1) if size is None else size
        tokens = x if norm is None else norm(x)
        query, key, value = (
            convolved(projection, tokens, size).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.queries, self.keys, self.values)
        )
        attended, context = efficient_attention(query, key, value, mask=mask)
        output = convolved(self.reprojection, attended.transpose(1, 2).flatten(2), size)
        return x + output if residual else output, context

    def explain(
        self,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        norm: nn.Module | None = None,
    ) -> LayerExplanation:
        """Tells whether a call with this norm runs fused, which backend it gets on this device and dtype (of the
        parameters, by default), and if it calls submodules, which, and why."""
        return explained(self, self._parts(), "efficient_self_attention", ("efficient_attention",), norm, device, dtype)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"
