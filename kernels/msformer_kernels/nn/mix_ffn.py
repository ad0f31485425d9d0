"""The layers over `mix_ffn`, with the parameters of the published implementations."""

from __future__ import annotations

from torch import Tensor, nn

from msformer_kernels.core.validation import check_positive
from msformer_kernels.nn.checkpoints import accept_other_names
from msformer_kernels.nn.norm import norm_arguments
from msformer_kernels.ops.mix_ffn.api import check_activation, mix_ffn


class _DepthwiseConv(nn.Module):
    """Holds the 3x3 depthwise convolution under the name of the published checkpoints, `dwconv.dwconv`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)


class MixFFN(nn.Module):
    """MixFFN of SegFormer (Xie et al., NeurIPS 2021): Linear, depthwise 3x3, activation, Linear.

    Args:
        in_features: C, of the input and the output.
        hidden_features: usually 4C.
        activation: ``"gelu"``, ``"gelu_tanh"``, ``"relu"``, ``"silu"``, ``"hardswish"`` or ``"relu6"``.

    Raises:
        ValueError: features below 1, an unknown activation.
    """

    skip = False

    def __init__(self, in_features: int, hidden_features: int, activation: str = "gelu") -> None:
        super().__init__()
        check_positive(in_features=in_features, hidden_features=hidden_features)
        check_activation(activation)
        self.activation = activation
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.dwconv = _DepthwiseConv(hidden_features)
        self.fc2 = nn.Linear(hidden_features, in_features)
        self.norm1: nn.LayerNorm | None = None
        self.register_load_state_dict_pre_hook(accept_other_names)

    def forward(
        self, x: Tensor, height: int, width: int, *, norm: nn.LayerNorm | None = None, residual: bool = False
    ) -> Tensor:
        """``[B, height * width, C]`` -> the same shape.

        Args:
            x: tokens, row by row.
            norm: a LayerNorm to apply to x first, fused in.
            residual: adds x to the output.
        """
        norm_weight, norm_bias, norm_eps = norm_arguments(norm, x)
        hidden_weight, hidden_bias = None, None
        # each attribute of a module costs a look-up
        fc1, convolution, fc2, hidden_norm = self.fc1, self.dwconv.dwconv, self.fc2, self.norm1
        if hidden_norm is not None:
            if norm is not None and norm.eps != hidden_norm.eps:
                raise ValueError(f"norm: has eps {norm.eps}, expected that of the hidden norm, {hidden_norm.eps}")
            hidden_weight, hidden_bias, norm_eps = hidden_norm.weight, hidden_norm.bias, hidden_norm.eps
        return mix_ffn(
            x,
            height,
            width,
            fc1.weight,
            fc1.bias,
            convolution.weight,
            convolution.bias,
            fc2.weight,
            fc2.bias,
            skip=self.skip,
            hidden_norm_weight=hidden_weight,
            hidden_norm_bias=hidden_bias,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            norm_eps=norm_eps,
            activation=self.activation,
            residual=residual,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class MixFFNSkip(MixFFN):
    """MixFFN-skip of MISSFormer (Huang et al., 2021) and MS-Former: the input of the depthwise convolution is added to
    its output, and a LayerNorm over the hidden features, `norm1`, comes before the activation.

    Arguments as `MixFFN`.
    """

    skip = True

    def __init__(self, in_features: int, hidden_features: int, activation: str = "gelu") -> None:
        super().__init__(in_features, hidden_features, activation)
        self.norm1 = nn.LayerNorm(hidden_features)
