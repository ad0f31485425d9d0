"""The layers over `mix_ffn`, with the parameters of the published implementations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from msformer_kernels.core.backends import Explanation
from msformer_kernels.core.validation import check_positive
from msformer_kernels.nn.activations import Activation, activation_name
from msformer_kernels.nn.checkpoints import accept_other_names
from msformer_kernels.nn.honest import (
    LayerExplanation,
    Parts,
    built_here,
    convolved,
    explained,
    weight_and_bias,
    why_called,
    why_depthwise,
    why_layer_norm,
    why_linear,
    why_not_fused,
    why_other_dtype,
)
from msformer_kernels.nn.norm import norm_arguments, why_norm_is_called
from msformer_kernels.ops.mix_ffn.api import check_image, check_kernel_size, mix_ffn
from msformer_kernels.ops.mix_ffn.reference import ACTIVATIONS


@built_here
class DepthwiseConv(nn.Module):
    """The depthwise convolution of tokens, under the name of the published checkpoints, `dwconv.dwconv`."""

    def __init__(self, channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """``[B, height * width, channels]`` -> the same shape."""
        return convolved(self.dwconv, x, (height, width))


def image_size(height: int | tuple[int, int], width: int | None) -> tuple[int, int]:
    """Height and width, given as two numbers or as one pair.

    Raises TypeError if it is neither.
    """
    if width is not None and not isinstance(height, (tuple, list)):
        return height, width
    if width is None and isinstance(height, (tuple, list)) and len(height) == 2:
        return height[0], height[1]
    raise TypeError(f"height, width: expected two numbers or one pair, got {height!r} and {width!r}")


def _why_holder(module: Any) -> str | None:
    return why_called(module, DepthwiseConv)


@built_here
class MixFFN(nn.Module):
    """MixFFN of SegFormer (Xie et al., NeurIPS 2021): Linear, depthwise convolution, activation, Linear.

    Args:
        in_features: C, of the input and the output.
        hidden_features: usually 4C.
        activation: ``"gelu"``, ``"gelu_tanh"``, ``"relu"``, ``"silu"``, ``"hardswish"``, ``"relu6"`` or
            ``"identity"``; or the module of PyTorch that computes it, its class, or its function (``nn.GELU()``,
            ``nn.SiLU``, ``F.relu``).
        inner_activation: likewise, after the first Linear; none by default.
        kernel_size: of the convolution: 3 as published, 5 or 7.

    Raises:
        ValueError: features below 1, an unknown activation, another kernel size.
    """

    skip = False

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        activation: Activation = "gelu",
        inner_activation: Activation = "identity",
        *,
        kernel_size: int = 3,
    ) -> None:
        super().__init__()
        check_positive(in_features=in_features, hidden_features=hidden_features)
        check_kernel_size(kernel_size)
        self.activation = activation_name(activation)
        self.inner_activation = activation_name(inner_activation, "inner_activation")
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.dwconv = DepthwiseConv(hidden_features, kernel_size)
        self.fc2 = nn.Linear(hidden_features, in_features)
        self.norm1: nn.LayerNorm | None = None
        self.register_load_state_dict_pre_hook(accept_other_names)

    def forward(
        self,
        x: Tensor,
        height: int | tuple[int, int],
        width: int | None = None,
        *,
        norm: nn.Module | None = None,
        residual: bool = False,
    ) -> Tensor:
        """``[B, height * width, C]`` -> the same shape.

        Args:
            x: tokens, row by row.
            height, width: of the image; or both as one pair in place of the height.
            norm: a module to apply to x first; a plain LayerNorm is fused in.
            residual: adds x to the output.
        """
        height, width = image_size(height, width)
        if why_norm_is_called(norm, x) is not None:
            assert norm is not None
            output = self._run(norm(x), height, width, None, False)
            return x + output if residual else output
        return self._run(x, height, width, norm, residual)  # type: ignore[arg-type]

    def _run(self, x: Tensor, height: int, width: int, norm: nn.LayerNorm | None, residual: bool) -> Tensor:
        if why_not_fused(self._parts()) is not None:
            return self._by_parts(x, height, width, norm, residual)
        modules: dict[str, Any] = self._modules
        fc1_weight, fc1_bias = weight_and_bias(modules["fc1"])
        dw_weight, dw_bias = weight_and_bias(modules["dwconv"]._modules["dwconv"])
        fc2_weight, fc2_bias = weight_and_bias(modules["fc2"])
        norm_weight, norm_bias, norm_eps = norm_arguments(norm, x.shape[-1], x)
        hidden_norm = self._hidden_norm()
        hidden_weight, hidden_bias = None, None
        if hidden_norm is not None:
            if norm is not None and norm.eps != hidden_norm.eps:
                raise ValueError(f"norm: has eps {norm.eps}, expected that of the hidden norm, {hidden_norm.eps}")
            hidden_weight, hidden_bias, norm_eps = norm_arguments(hidden_norm, fc1_weight.shape[0], x)
        return mix_ffn(
            x,
            height,
            width,
            fc1_weight,
            fc1_bias,
            dw_weight,
            dw_bias,
            fc2_weight,
            fc2_bias,
            skip=self.skip,
            hidden_norm_weight=hidden_weight,
            hidden_norm_bias=hidden_bias,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            norm_eps=norm_eps,
            activation=self.activation,
            inner_activation=self.inner_activation,
            residual=residual,
        )

    def _hidden_norm(self) -> Any:
        found = self._modules.get("norm1")
        return self.norm1 if found is None else found  # an attribute that is a module is slow, one that is None is not

    def _parts(self) -> Parts:
        modules = self._modules
        fc1, mixer, fc2 = modules.get("fc1"), modules.get("dwconv"), modules.get("fc2")
        convolution = None if mixer is None else mixer._modules.get("dwconv")
        parts = (
            ("fc1", fc1, why_linear),
            ("dwconv", mixer, _why_holder),
            ("dwconv.dwconv", convolution, why_depthwise),
            ("fc2", fc2, why_linear),
        )
        norm = self._hidden_norm()
        return parts if norm is None else (*parts, ("norm1", norm, self._why_hidden_norm))

    def _why_hidden_norm(self, norm: Any) -> str | None:
        weight = getattr(self._modules.get("fc1"), "weight", None)
        why = why_layer_norm(norm)
        return why if why or weight is None else why_other_dtype(norm, weight.dtype, weight.device.type)

    def _by_parts(self, x: Tensor, height: int, width: int, norm: nn.Module | None, residual: bool) -> Tensor:
        """`forward` that calls every submodule."""
        check_image(x, height, width)
        hidden = ACTIVATIONS[self.inner_activation](self.fc1(x if norm is None else norm(x)))
        mixed = self.dwconv(hidden, height, width)
        if self.skip:
            mixed = mixed + hidden
        if self.norm1 is not None:
            mixed = self.norm1(mixed)
        output = self.fc2(ACTIVATIONS[self.activation](mixed))
        return x + output if residual else output

    def explain(
        self,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        norm: nn.Module | None = None,
    ) -> LayerExplanation:
        """Tells whether a call with this norm runs fused, which backend it gets on this device and dtype (of the
        parameters, by default), and if it calls submodules, which, and why."""
        return explained(self, self._parts(), "mix_ffn", (), norm, device, dtype, self._explain_operator)

    def _explain_operator(self, device: str | torch.device, dtype: torch.dtype, name: str) -> Explanation:
        """Of a call with these options and sizes, by which some backends are limited."""
        with FakeTensorMode():
            fc1_weight, fc1_bias, *others = (
                None if p is None else torch.empty(p.shape, device=device, dtype=dtype)
                for layer in (self.fc1, self.dwconv.dwconv, self.fc2)
                for p in weight_and_bias(layer)
            )
            assert fc1_weight is not None
            x = fc1_weight.new_empty(1, 1, fc1_weight.shape[1])
            found = mix_ffn.explain(  # type: ignore[attr-defined]
                x, 1, 1, fc1_weight, fc1_bias, *others, inner_activation=self.inner_activation
            )
        assert isinstance(found, Explanation)
        return found

    def extra_repr(self) -> str:
        inner = "" if self.inner_activation == "identity" else f", inner_activation={self.inner_activation!r}"
        return f"activation={self.activation!r}{inner}"


@built_here
class MixFFNSkip(MixFFN):
    """MixFFN-skip of MISSFormer (Huang et al., 2021) and MS-Former: the input of the depthwise convolution is added to
    its output, and a LayerNorm over the hidden features, `norm1`, comes before the activation.

    Arguments as `MixFFN`.
    """

    skip = True

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        activation: Activation = "gelu",
        inner_activation: Activation = "identity",
        *,
        kernel_size: int = 3,
    ) -> None:
        super().__init__(in_features, hidden_features, activation, inner_activation, kernel_size=kernel_size)
        self.norm1 = nn.LayerNorm(hidden_features)
