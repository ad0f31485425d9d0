"""The layer over `linear`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from msformer_kernels.nn.honest import LayerExplanation, explained, why_parameters
from msformer_kernels.ops.linear.api import linear


class TokenLinear(nn.Linear):
    """`torch.nn.Linear` for tokens ``[B, N, in]``; arguments and parameters are the same."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, in]`` -> ``[B, N, out]``."""
        return linear(x, self.weight, self.bias)

    def explain(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> LayerExplanation:
        """Tells which backend a call gets on this device and dtype (of the parameters, by default)."""
        return explained(self, (("parameters", self, why_parameters),), "linear", (), None, device, dtype)
