"""A pre-norm transformer block: efficient attention, then a feed-forward layer, norms and residuals fused in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from msformer_kernels.core.validation import check_positive
from msformer_kernels.nn.activations import Activation, activation_name
from msformer_kernels.nn.attention import EfficientAttention
from msformer_kernels.nn.honest import LayerExplanation, built_here, why_any_is_called, why_called
from msformer_kernels.nn.mix_ffn import MixFFN, MixFFNSkip, image_size
from msformer_kernels.ops.mix_ffn.api import check_image
from msformer_kernels.ops.mix_ffn.reference import ACTIVATIONS


@built_here
class MLP(nn.Module):
    """Linear, activation, Linear: a feed-forward layer without the convolution, in plain PyTorch.

    Arguments as `MixFFN`; without the convolution there is no inner activation but the identity.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        activation: Activation = "gelu",
        inner_activation: Activation = "identity",
    ) -> None:
        super().__init__()
        self.activation = activation_name(activation)
        if activation_name(inner_activation, "inner_activation") != "identity":
            raise ValueError(
                f"inner_activation: comes before a convolution, which ffn='mlp' has not, got {inner_activation!r}"
            )
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(
        self,
        x: Tensor,
        height: int | tuple[int, int],
        width: int | None = None,
        *,
        norm: nn.Module | None = None,
        residual: bool = False,
    ) -> Tensor:
        """As `MixFFN.forward`; height and width are not used."""
        output = self.fc2(ACTIVATIONS[self.activation](self.fc1(x if norm is None else norm(x))))
        return x + output if residual else output

    def explain(
        self,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        norm: nn.Module | None = None,
    ) -> LayerExplanation:
        """It is never fused."""
        return LayerExplanation(type(self).__name__, False, {"every module": "the layer is plain PyTorch"})


FEED_FORWARD: dict[str, type[MixFFN] | type[MLP]] = {"mix_skip": MixFFNSkip, "mix": MixFFN, "mlp": MLP}


class EfficientTransformerBlock(nn.Module):
    """``x + EfficientAttention(LN(x))``, then ``+ FFN(LN(.))``, on tokens.

    Norms and residuals are fused into the layers; if `attn` or `mlp` was wrapped, replaced or hooked, it is called with
    normalised tokens, as written.

    Karimijafarbigloo et al., "MS-Former", MIDL 2023.

    Args:
        dim: channels C.
        num_heads: must divide dim.
        ffn: ``"mix_skip"`` (`MixFFNSkip`), ``"mix"`` (`MixFFN`) or ``"mlp"`` (no convolution).
        mlp_ratio: hidden features of the feed-forward layer, in units of dim.
        activation, inner_activation: of the feed-forward layer, see `MixFFN`.

    Raises:
        ValueError: an unknown ffn or activation, an inner activation for ``"mlp"``, a head count that does not divide,
            sizes below 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        ffn: str = "mix_skip",
        mlp_ratio: float = 4,
        activation: Activation = "gelu",
        inner_activation: Activation = "identity",
    ) -> None:
        super().__init__()
        if ffn not in FEED_FORWARD:
            raise ValueError(f"ffn: expected one of {', '.join(FEED_FORWARD)}, got {ffn!r}")
        check_positive(dim=dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = EfficientAttention(dim, num_heads=num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = FEED_FORWARD[ffn](dim, int(dim * mlp_ratio), activation, inner_activation)

    def forward(self, x: Tensor, height: int | tuple[int, int], width: int | None = None) -> tuple[Tensor, Tensor]:
        """``[B, height * width, C]`` -> the same shape, and the context ``[B, heads, C / heads, C / heads]``. Height
        and width may come as one pair."""
        height, width = image_size(height, width)
        check_image(x, height, width)
        modules = self._modules
        if _why_attention_is_called(modules["attn"]) is None:
            x, context = self.attn(x, norm=self.norm1, residual=True, size=(height, width))
        else:
            size = {"size": (height, width)} if isinstance(self.attn, EfficientAttention) else {}
            attended, context = self.attn(self.norm1(x), **size)
            x = x + attended
        if _why_feed_forward_is_called(modules["mlp"]) is None:
            return self.mlp(x, height, width, norm=self.norm2, residual=True), context
        return x + self.mlp(self.norm2(x), height, width), context

    def explain(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> LayerExplanation:
        """Tells which of its layers run fused, which backends they get on this device and dtype (of the parameters, by
        default), and which submodules they call, and why."""
        parts = {}
        for name, why, norm in (
            ("attn", _why_attention_is_called, "norm1"),
            ("mlp", _why_feed_forward_is_called, "norm2"),
        ):
            layer, reason = getattr(self, name), why(self._modules[name])
            if not hasattr(layer, "explain"):
                parts[name] = LayerExplanation(type(layer).__name__, False, {name: str(reason)})
            elif reason is None:
                parts[name] = layer.explain(device, dtype, norm=getattr(self, norm))
            else:
                found = layer.explain(device, dtype)
                parts[name] = replace(found, reasons={**found.reasons, norm: f"{name} {reason}"})
        fused = all(part.fused for part in parts.values())
        return LayerExplanation(type(self).__name__, fused, parts=parts)


def _why_attention_is_called(layer: Any) -> str | None:
    """Why the attention gets tokens that are normalised, and no norm and residual to fuse: a tool sees its call."""
    return why_any_is_called() or why_called(layer, EfficientAttention)


def _why_feed_forward_is_called(layer: Any) -> str | None:
    """Likewise the feed-forward layer."""
    built = type(layer) if type(layer) in tuple(FEED_FORWARD.values()) else MixFFN
    return why_any_is_called() or why_called(layer, built)
