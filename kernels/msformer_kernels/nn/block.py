"""A pre-norm transformer block: efficient attention, then a feed-forward layer, norms and residuals fused in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msformer_kernels.core.validation import check_positive
from msformer_kernels.nn.attention import EfficientAttention
from msformer_kernels.nn.honest import LayerExplanation
from msformer_kernels.nn.mix_ffn import MixFFN, MixFFNSkip
from msformer_kernels.ops.mix_ffn.api import check_image


class MLP(nn.Module):
    """Linear, GELU, Linear: a feed-forward layer without the convolution, in plain PyTorch."""

    def __init__(self, in_features: int, hidden_features: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(
        self, x: Tensor, height: int, width: int, *, norm: nn.Module | None = None, residual: bool = False
    ) -> Tensor:
        """As `MixFFN.forward`; height and width only have to fit."""
        output = self.fc2(F.gelu(self.fc1(x if norm is None else norm(x))))
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

    Karimijafarbigloo et al., "MS-Former", MIDL 2023.

    Args:
        dim: channels C.
        num_heads: must divide dim.
        ffn: ``"mix_skip"`` (`MixFFNSkip`), ``"mix"`` (`MixFFN`) or ``"mlp"`` (no convolution).
        mlp_ratio: hidden features of the feed-forward layer, in units of dim.

    Raises:
        ValueError: an unknown ffn, a head count that does not divide, sizes below 1.
    """

    def __init__(self, dim: int, num_heads: int = 1, ffn: str = "mix_skip", mlp_ratio: float = 4) -> None:
        super().__init__()
        if ffn not in FEED_FORWARD:
            raise ValueError(f"ffn: expected one of {', '.join(FEED_FORWARD)}, got {ffn!r}")
        check_positive(dim=dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = EfficientAttention(dim, num_heads=num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = FEED_FORWARD[ffn](dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """``[B, height * width, C]`` -> the same shape, and the context ``[B, heads, C / heads, C / heads]``."""
        check_image(x, height, width)
        x, context = self.attn(x, norm=self.norm1, residual=True, size=(height, width))
        return self.mlp(x, height, width, norm=self.norm2, residual=True), context

    def explain(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> LayerExplanation:
        """Tells which of its layers run fused, which backends they get on this device and dtype (of the parameters, by
        default), and which submodules they call, and why."""
        parts = {
            name: getattr(self, name).explain(device, dtype, norm=norm)
            for name, norm in (("attn", self.norm1), ("mlp", self.norm2))
            if hasattr(getattr(self, name), "explain")
        }
        fused = len(parts) == 2 and all(part.fused for part in parts.values())
        return LayerExplanation(type(self).__name__, fused, parts=parts)
