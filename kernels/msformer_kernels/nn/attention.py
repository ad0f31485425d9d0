"""The layer over `efficient_self_attention`, with the parameters of the published implementation."""

from __future__ import annotations

from torch import Tensor, nn

from msformer_kernels.core.validation import check_heads, check_positive
from msformer_kernels.nn.checkpoints import accept_other_shapes
from msformer_kernels.nn.norm import norm_arguments
from msformer_kernels.ops.efficient_self_attention.api import efficient_self_attention


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
        self, x: Tensor, *, norm: nn.LayerNorm | None = None, residual: bool = False, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Output and context of tokens or of an image.

        Args:
            x: tokens ``[B, N, C]``, or an image ``[B, C, H, W]`` (channels-last without a copy).
            norm: a LayerNorm to apply to x first, fused in.
            residual: adds x to the output.
            mask: boolean ``[B, N]``, True keeps a token as a key.

        Returns:
            output, shaped like x, and context ``[B, heads, Dk / heads, Dv / heads]``.
        """
        tokens = x.flatten(2).transpose(1, 2) if x.dim() == 4 else x
        norm_weight, norm_bias, norm_eps = norm_arguments(norm, tokens)
        queries, keys, values, reprojection = self.queries, self.keys, self.values, self.reprojection
        output, context = efficient_self_attention(
            tokens,
            queries.weight.flatten(1),
            queries.bias,
            keys.weight.flatten(1),
            keys.bias,
            values.weight.flatten(1),
            values.bias,
            reprojection.weight.flatten(1),
            reprojection.bias,
            num_heads=self.num_heads,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            norm_eps=norm_eps,
            residual=residual,
            mask=mask,
        )
        if x.dim() == 4:
            output = output.transpose(1, 2).unflatten(2, x.shape[2:])
        return output, context

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"
