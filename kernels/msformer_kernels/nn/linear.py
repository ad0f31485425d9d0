"""The layer over `linear`."""

from __future__ import annotations

from torch import Tensor, nn

from msformer_kernels.ops.linear.api import linear


class TokenLinear(nn.Linear):
    """`torch.nn.Linear` for tokens ``[B, N, in]``; arguments and parameters are the same."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, in]`` -> ``[B, N, out]``."""
        return linear(x, self.weight, self.bias)
