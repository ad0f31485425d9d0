"""The layer over `linear`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from msformer_kernels.nn.checkpoints import accept_other_shapes
from msformer_kernels.nn.honest import LayerExplanation, explained, why_parameters
from msformer_kernels.ops.linear.api import linear


class TokenLinear(nn.Linear):
    """`torch.nn.Linear` for tokens ``[B, N, in]``; arguments and parameters are the same."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register_load_state_dict_pre_hook(accept_other_shapes)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, in]`` -> ``[B, N, out]``."""
        if why_parameters(self) is not None:
            return super().forward(x)
        return linear(x, self.weight, self.bias)

    def explain(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> LayerExplanation:
        """Tells which backend a call gets on this device and dtype (of the parameters, by default)."""
        return explained(self, (("parameters", self, why_parameters),), "linear", (), None, device, dtype)
