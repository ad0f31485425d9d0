"""The small convolutional network on the pixels of one image that several methods share.

Kim, Kanezaki, Tanaka, "Unsupervised Learning of Image Segmentation Based on Differentiable Feature Clustering", IEEE
TIP 2020, figure 2; used by SGSCN, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msformer.baselines import LabelMap, Task
from msformer.segmentation import seeded
from msformer.streams import own_stream

CHANNELS = 100


def pixel_network(channels: int = CHANNELS) -> nn.Sequential:
    """``[B, 3, h, w]`` -> ``[B, channels, h, w]``; the last BatchNorm's output are the logits."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.ReLU(),
        nn.BatchNorm2d(channels),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
        nn.BatchNorm2d(channels),
        nn.Conv2d(channels, channels, 1),
        nn.BatchNorm2d(channels),
    )


def self_labelling(logits: Tensor) -> Tensor:
    """Cross-entropy of the logits ``[1, K, h, w]`` against their own argmax."""
    return F.cross_entropy(logits, logits.argmax(1))


def continuity(logits: Tensor) -> Tensor:
    """Mean absolute difference of the logits between vertical neighbours, plus that between horizontal ones."""
    found: Tensor = _Continuity.apply(logits)
    return found


class _Continuity(torch.autograd.Function):
    """Written as one function for the sake of its backward: autograd would make a gradient of the whole image for each
    of the four crops, and add them up, a quarter of the time of a step.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return torch.stack([logits.diff(dim=dim).abs_().mean() for dim in (2, 3)]).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        result = torch.zeros_like(logits)
        for dim in (2, 3):
            signs = logits.diff(dim=dim).sign_()
            signs *= grad / signs.numel()
            result.narrow(dim, 1, signs.shape[dim]).add_(signs)
            result.narrow(dim, 0, signs.shape[dim]).sub_(signs)
        return result


@dataclass(frozen=True)
class Fit:
    """How a pixel network is fitted to one image, until at most `min_labels` labels are left."""

    loss: Callable[[Tensor], Tensor]
    """Of the logits ``[1, K, h, w]``."""
    max_steps: int
    learning_rate: float = 0.1
    momentum: float = 0.9
    min_labels: int = 3

    def label_map(self, task: Task) -> LabelMap:
        """The argmax of the logits before the step at which few enough labels were left, or after the last."""
        with own_stream(task.device):
            with seeded(task.seed, task.device):
                network = pixel_network()
            network = network.to(task.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            image = task.image[None].to(task.device).contiguous(memory_format=torch.channels_last)
            optimizer = torch.optim.SGD(network.parameters(), lr=self.learning_rate, momentum=self.momentum)
            for step in range(self.max_steps):
                logits = network(image)
                labels = logits.argmax(1)
                if len(labels.unique()) <= self.min_labels:
                    return LabelMap(labels[0].cpu().numpy(), step)
                optimizer.zero_grad()
                self.loss(logits).backward()
                optimizer.step()
                task.report(step + 1, self.max_steps)
            with torch.no_grad():
                return LabelMap(network(image).argmax(1)[0].cpu().numpy(), self.max_steps)
