"""The layer over `batch_norm`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from msformer_kernels.core.backends import choose
from msformer_kernels.ops.batch_norm.api import batch_norm
from msformer_kernels.ops.batch_norm.reference import as_image, as_tokens
from msformer_kernels.ops.batch_norm.spec import OPERATOR


class TokenBatchNorm(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` for tokens ``[B, N, C]`` of channels-last images; arguments, parameters and buffers are
    the same. In evaluation mode, with running statistics, it is plain PyTorch.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, C]`` -> the same shape."""
        trains = self.training or self.running_mean is None
        if not trains or choose(OPERATOR, None, x.device.type, x.dtype, None) == "reference":
            return as_tokens(super().forward(as_image(x)))
        output, mean, variance = batch_norm(x, self.weight, self.bias, eps=self.eps)
        if self.training and self.track_running_stats:
            self._track(mean, variance, x.shape[0] * x.shape[1])
        return output

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        unbiased = variance * (count / max(count - 1, 1))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), factor)
