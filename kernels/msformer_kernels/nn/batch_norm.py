"""The layer over `batch_norm`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from msformer_kernels.core.backends import choose
from msformer_kernels.nn.honest import LayerExplanation, explained, why_parameters
from msformer_kernels.ops.batch_norm.api import batch_norm
from msformer_kernels.ops.batch_norm.reference import as_rows, norm_of_tokens
from msformer_kernels.ops.batch_norm.spec import OPERATOR


class TokenBatchNorm(_NormBase):
    """`torch.nn.BatchNorm2d` for tokens ``[B, N, C]`` of channels-last images; arguments, parameters and buffers are
    the same. In evaluation mode, with running statistics, it is plain PyTorch.

    It is no BatchNorm2d, for tools that replace those by modules for images would have tokens taken for channels. Its
    submodule `statistics`, without parameters and buffers, is what such tools find:
    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` makes it a SyncBatchNorm, and the layer then takes its statistics
    over the processes of that; `torch.optim.swa_utils.update_bn` works; in evaluation mode it keeps the layer there.

    Raises:
        TypeError: a call where `statistics` was replaced by anything but a SyncBatchNorm.
    """

    def __init__(self, num_features: int, *arguments: Any, **options: Any) -> None:
        super().__init__(num_features, *arguments, **options)
        self.statistics: nn.Module = _Statistics(self)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, C]`` -> the same shape."""
        statistics: Any = self._modules["statistics"]
        learns = self.training and statistics.training
        if type(statistics) is not _Statistics:
            return self._synchronized(as_rows(x), statistics, learns).view(x.shape)
        tracked = learns and self.track_running_stats
        if not learns and self.running_mean is not None:
            return norm_of_tokens(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        factor = self._count() if tracked else 0.0
        if choose(OPERATOR, None, x.device.type, x.dtype, None) == "reference":
            running = (self.running_mean, self.running_var) if tracked else (None, None)
            options: dict[str, Any] = {"training": True, "momentum": factor, "eps": self.eps}
            return norm_of_tokens(x, *running, self.weight, self.bias, **options)
        output, mean, variance = batch_norm(x, self.weight, self.bias, eps=self.eps)
        if tracked:
            self._track(mean, variance, x.shape[0] * x.shape[1], factor)
        return output

    def explain(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> LayerExplanation:
        """Tells whether a call runs fused, and which backend it gets on this device and dtype (of the parameters, by
        default)."""
        learns = self.training and self.statistics.training
        plain = "evaluation mode is plain PyTorch" if not learns and self.running_mean is not None else None
        synchronized = None if type(self.statistics) is _Statistics else "are synchronized by PyTorch"
        parts = (
            ("parameters", self, why_parameters),
            ("mode", self, lambda _: plain),
            ("statistics", self, lambda _: synchronized),
        )
        return explained(self, parts, OPERATOR.name, (), None, device, dtype)

    def _count(self) -> float:
        """Counts a batch; returns its weight in the running statistics."""
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        return 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: int, factor: float) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        unbiased = variance * (count / max(count - 1, 1))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), factor)

    def _synchronized(self, rows: Tensor, statistics: nn.Module, learns: bool) -> Tensor:
        """By a SyncBatchNorm with the parameters and buffers of this layer, and the processes of `statistics`."""
        if not isinstance(statistics, nn.SyncBatchNorm):
            raise TypeError(f"statistics: expected what it was, or a SyncBatchNorm, got {type(statistics).__name__}")
        norm = nn.SyncBatchNorm.__new__(nn.SyncBatchNorm)
        norm.__dict__.update(self.__dict__, training=learns, process_group=statistics.process_group)
        return norm.forward(rows)


class _Statistics(_BatchNorm):
    """The submodule `statistics` of a `TokenBatchNorm`; what is asked of it goes to the layer."""

    _layer: tuple[TokenBatchNorm]

    def __init__(self, layer: TokenBatchNorm) -> None:
        object.__setattr__(self, "_layer", (layer,))  # in a tuple, for a module would be a submodule
        super().__init__(layer.num_features, layer.eps, layer.momentum, affine=False, track_running_stats=False)

    @property
    def momentum(self) -> float | None:
        return self._layer[0].momentum

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        self._layer[0].momentum = value

    def extra_repr(self) -> str:
        return ""

    def reset_running_stats(self) -> None:
        self._layer[0].reset_running_stats()
