"""The loop that trains a network on batches of crops.

A batch is shared by the processes of a training, and each may split its share in parts, one after the other. Losses are
normalised over the whole batch, and BatchNorm takes its statistics over all processes, so that one process and several
take the same steps but for rounding. What was measured at a step is read a few steps later, as reading it makes a GPU
wait.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from msformer.model import MSFormer, MSFormerOutput
from msformer.segmentation import seeded
from msformer.training.batches import Batch, Batches
from msformer.training.checkpoint import State
from msformer.training.distributed import ALONE, Processes, is_spread, spread_batch_norms, total
from msformer.training.objectives import Objective, Shares, Targets
from msformer.training.settings import LARGEST_GRADIENT, WEIGHT_DECAY, Settings

READ_EVERY = 10
"""Steps after which what was measured is read, and the loop may be stopped."""

AGREEMENT = "agreement"
"""Measured at each step beside the losses: mean Dice coefficient of network and target, each pixel by its weight."""


def make_network(settings: Settings, objective: Objective, device: torch.device) -> MSFormer:
    """A network with the initial weights of the settings' seed; what no loss reaches is not trained."""
    with seeded(settings.seed, torch.device("cpu")):
        network = MSFormer(3, settings.embed_dim, objective.clusters, settings.depth)
    network.initialise_icnr()
    if not objective.needs_attention:
        for unused in (network.bn3, network.to_patch_embedding):
            unused.requires_grad_(False)
    return network.to(device)


class Trainer:
    """A network that is being trained, and the state that goes into checkpoints."""

    def __init__(
        self,
        settings: Settings,
        objective: Objective,
        state: State,
        device: torch.device,
        processes: Processes = ALONE,
    ) -> None:
        """
        Args:
            settings: of the training.
            objective: the one that the settings name, with their weights.
            state: where to begin; is brought up to date as the training goes on.
            device: of the network.
            processes: those of the training.
        """
        self.settings, self.objective, self.state, self.device = settings, objective, state, device
        self.processes = processes
        self.network = make_network(settings, objective, device)
        if is_spread():
            spread_batch_norms(self.network)
        if state.network is not None:
            self.network.load_state_dict(state.network)
        self.network.train()
        trained = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
        if state.optimizer is not None:
            self.optimizer.load_state_dict(state.optimizer)
        self.trained = trained
        self._called: nn.Module = self.network
        if is_spread():
            ids = [device] if device.type == "cuda" else None
            self._called = DistributedDataParallel(self.network, device_ids=ids)

    def run(self, batches: Batches, each: Callable[[State], bool]) -> bool:
        """Takes the steps that are left of a round; once.

        Args:
            batches: of this round, this process's share.
            each: called after every few steps; returns whether to stop. One process is enough to stop all.

        Returns:
            Whether the round was finished.

        Raises:
            FloatingPointError: a loss became NaN or infinite.
        """
        try:
            return self._take_steps(batches, each)
        finally:
            self._part()

    def _part(self) -> None:
        """Gives up what gradients are summed with. Destroyed after the group of processes, it holds the interpreter
        while it waits for gloo's threads, which wait for the interpreter.
        """
        if self._called is not self.network:
            self._called = self.network
            gc.collect()

    def _take_steps(self, batches: Batches, each: Callable[[State], bool]) -> bool:
        measured: list[Tensor] = []
        begun = time.perf_counter()
        while self.state.step < self.settings.steps:
            asked = time.perf_counter()
            batch = batches.make(self.state.step)
            self.state.waited += time.perf_counter() - asked
            measured.append(self.step(batch))
            self.state.step += 1
            if self.state.step % READ_EVERY == 0 or self.state.step == self.settings.steps:
                self._keep(measured)
                measured.clear()
                now = time.perf_counter()
                self.state.seconds += now - begun
                begun = now
                if self._any(each(self.state)):
                    break
        return self.state.step == self.settings.steps

    def step(self, batch: Batch) -> Tensor:
        """One step; returns this process's shares of each loss and of the agreement."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(self.state.step, self.state.round)
        parts = self.settings.accumulate
        shares = Shares(self.settings.batch, total(batch.weight.sum()), parts, self.processes.count)
        self.optimizer.zero_grad()
        found = []
        for number, part in enumerate(batch.parts(parts, self.objective.views), start=1):
            with self._synchronised(number == parts):
                output = self._forward(part.images)
                losses = self.objective.losses(output, Targets(part.target, part.weight), shares)
                # processes average their gradients, but their shares add up
                (self.objective.total(losses) * self.processes.count).backward()
            agreed = agreement(output.logits, part) / self.settings.batch
            found.append(torch.stack([*(loss.detach() for loss in losses.values()), agreed]))
        nn.utils.clip_grad_norm_(self.trained, LARGEST_GRADIENT)
        self.optimizer.step()
        return torch.stack(found).sum(0)

    def _forward(self, images: Tensor) -> MSFormerOutput:
        half = self.settings.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            output: MSFormerOutput = self._called(images, attention=self.objective.needs_attention)
        return output

    def _synchronised(self, last: bool) -> AbstractContextManager[None]:
        """Gradients are summed over the processes once a step, with the last part."""
        if last or not isinstance(self._called, DistributedDataParallel):
            return nullcontext()
        return self._called.no_sync()

    def _keep(self, measured: list[Tensor]) -> None:
        names = [*self.objective.used, AGREEMENT]
        values = total(torch.stack(measured)).tolist()
        for name, column in zip(names, zip(*values, strict=True), strict=True):
            self.state.history.setdefault(name, []).extend(column)
        if not all(math.isfinite(value) for row in values for value in row):
            raise FloatingPointError(
                f"the loss became NaN or infinite before step {self.state.step}; try a smaller learning rate"
            )

    def _any(self, stop: bool) -> bool:
        return bool(total(torch.tensor(float(stop), device=self.device)) > 0)

    def snapshot(self) -> State:
        """The state with weights and optimiser as they are."""
        self.state.network = self.network.state_dict()
        self.state.optimizer = self.optimizer.state_dict()
        return self.state


@torch.no_grad()
def agreement(logits: Tensor, part: Batch) -> Tensor:
    """Sum over images of the Dice coefficient of network and target, each pixel by its weight; 0 of clusters."""
    if logits.shape[1] != 2:
        return logits.new_zeros((), dtype=torch.float32)
    seen = (logits[:, 1] > logits[:, 0]).float()
    both = (part.weight * seen * part.target).sum((1, 2))
    either = (part.weight * (seen + part.target)).sum((1, 2))
    return torch.where(either > 0, 2 * both / either.clamp(min=1e-6), 1.0).sum()
