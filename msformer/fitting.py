"""The loop that fits an MS-Former to one image: steps of gradient descent until few enough labels are left.

On the CPU a step is taken, its labels are counted, and the next one is decided on. On a GPU that would leave the device
idle while Python launches some hundred kernels a step and waits for a number. There the whole step (forward, losses,
backward, gradient descent, count of labels) is captured in a CUDA graph once and replayed. Steps are launched a few
ahead of what the host has read; the stop rule is decided on the device, where steps after the last one change nothing.
Several images may be fitted at a time, each in a thread and on a stream of its own; graphs are captured one by one.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msformer.losses import total_loss
from msformer.model import MSFormer
from msformer.presets import LossWeights

Progress = Callable[[int, int, float], None]

_warming_up, _capturing = threading.Lock(), threading.Lock()

STEPS_AHEAD = 3
"""Steps that are launched before the host looks at the result of one."""


@dataclass(frozen=True)
class Rule:
    """How the fit descends, and when it stops: after the step before which at most `min_labels` labels were left."""

    weights: LossWeights
    learning_rate: float
    momentum: float
    max_steps: int
    min_labels: int


@dataclass
class History:
    """The loss, and the labels in the map, before each step."""

    losses: list[float] = field(default_factory=list)
    label_counts: list[int] = field(default_factory=list)

    def add(self, loss: float, count: int, report: Progress) -> None:
        """Raises FloatingPointError for a loss that is not finite."""
        step = len(self.losses) + 1
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss} at step {step}; try a smaller learning rate")
        report(step, count, loss)
        self.losses.append(loss)
        self.label_counts.append(count)


def fit(model: MSFormer, image: Tensor, rule: Rule, report: Progress) -> History:
    """Fits the model to ``[1, 3, h, w]`` in place; on a GPU, on the current stream, by a captured step if possible."""
    model.train()
    if image.device.type == "cuda":
        steps = DeviceSteps(model, image, rule)
        try:
            steps.capture()
            return steps.run(report)
        except RuntimeError as error:
            if isinstance(error, torch.cuda.OutOfMemoryError) or steps.started:
                raise
            reason = str(error).splitlines()[0]
            warnings.warn(f"the step cannot be captured in a CUDA graph, and is slower without: {reason}", stacklevel=2)
    return _fit_step_by_step(model, image, rule, report)


def _fit_step_by_step(model: MSFormer, image: Tensor, rule: Rule, report: Progress) -> History:
    optimizer = torch.optim.SGD(model.parameters(), lr=rule.learning_rate, momentum=rule.momentum, fused=True)
    history = History()
    while len(history.losses) < rule.max_steps:
        loss, count = _loss_and_count(model, image, rule.weights)
        history.add(loss.item(), int(count), report)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if history.label_counts[-1] <= rule.min_labels:
            break
    return history


def _loss_and_count(model: MSFormer, image: Tensor, weights: LossWeights) -> tuple[Tensor, Tensor]:
    """The loss, and how many labels its map has."""
    output = model(image, attention=weights.intra != 0)
    labels = output.logits.argmax(1)
    present = torch.zeros(model.num_clusters, dtype=torch.int64, device=image.device)
    return total_loss(output, labels, weights), present.index_fill(0, labels.flatten(), 1).sum()


@torch.no_grad()
def label_map(model: MSFormer, image: Tensor) -> NDArray[np.int64]:
    """The label map ``[h, w]`` of the weights as they are."""
    found: NDArray[np.int64] = model(image, attention=False).logits.argmax(1)[0].cpu().numpy()
    return found


class DeviceSteps:
    """Steps that run without the host: state, history and stop rule are tensors on the device.

    `step` may be captured and replayed, or called.
    """

    def __init__(self, model: MSFormer, image: Tensor, rule: Rule) -> None:
        self.model, self.image, self.rule = model, image, rule
        self.started = False
        self.parameters = list(model.parameters())
        self.velocities = [torch.zeros_like(p) for p in self.parameters]
        # loss and number of labels before each step; which step is next; whether it still counts (0 or 1)
        self.history = torch.zeros(rule.max_steps, 2, dtype=torch.float64, device=image.device)
        self.next = torch.zeros(1, dtype=torch.int64, device=image.device)
        self.active = torch.ones((), device=image.device)
        self._replay: Callable[[], Any] = self.step

    def step(self) -> None:
        """One step; once the stop rule was met, none."""
        loss, count = _loss_and_count(self.model, self.image, self.rule.weights)
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        with torch.no_grad():
            used = [
                (p, v, g) for p, v, g in zip(self.parameters, self.velocities, gradients, strict=True) if g is not None
            ]
            velocities = [v for _, v, _ in used]
            torch._foreach_mul_(velocities, self.rule.momentum)
            torch._foreach_add_(velocities, [g for _, _, g in used])
            change = torch._foreach_mul(velocities, self.active * -self.rule.learning_rate)
            torch._foreach_add_([p for p, _, _ in used], change)
            row = torch.stack([loss.detach().double(), count.double()])
            self.history.index_copy_(0, self.next, row[None])
            self.active.mul_(count > self.rule.min_labels)
            self.next.add_(1).clamp_(max=self.rule.max_steps - 1)

    def capture(self) -> None:
        """Makes a CUDA graph of a step. The weights are as before afterwards, also if that fails.

        Raises:
            RuntimeError: the step cannot be captured, or the current stream is the default one.
        """
        parts = [*self.parameters, *self.model.buffers(), *self.velocities, self.history, self.next, self.active]
        with torch.no_grad():
            before = [x.clone() for x in parts]
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        try:
            with _warming_up:
                for _ in range(2):  # kernels are compiled and workspaces made
                    self.step()
            # on this fit's own stream: what libraries keep for a stream must not be shared with another fit's graph
            with _capturing, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self.step()
        finally:
            torch.cuda.set_stream(stream)  # a capture that fails leaves its own
            with torch.no_grad():
                for x, old in zip(parts, before, strict=True):
                    x.copy_(old)

        def replay() -> None:
            with _capturing:  # older PyTorch refuses a replay while another thread captures
                graph.replay()

        self._replay = replay

    def run(self, report: Progress) -> History:
        """All steps until the stop rule is met; raises FloatingPointError for a loss that is not finite."""
        self.started = True
        found = History()
        waiting: list[tuple[Tensor, torch.cuda.Event | None]] = []
        launched = 0
        while launched < self.rule.max_steps or waiting:
            if launched < self.rule.max_steps:
                self._replay()
                waiting.append(self._read_later(launched))
                launched += 1
            if len(waiting) > STEPS_AHEAD or launched == self.rule.max_steps:
                row, event = waiting.pop(0)
                if event is not None:
                    event.synchronize()
                loss, count = row.tolist()
                found.add(loss, int(count), report)
                if count <= self.rule.min_labels:
                    break
        return found

    def _read_later(self, step: int) -> tuple[Tensor, torch.cuda.Event | None]:
        """A row of the history on its way to the host, and the event after which it is there."""
        row = self.history[step]
        if row.device.type != "cuda":
            return row.clone(), None
        there = torch.empty(2, dtype=row.dtype, pin_memory=True).copy_(row, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return there, event
