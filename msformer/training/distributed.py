"""Training in several processes: who is there, sums over them, and BatchNorm over the whole batch.

Started by ``torchrun``, every process has a share of each batch, and the network is the same in all. One process alone
needs none of this; every function then does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from msformer.training.meeting import meet
from msformer_kernels import TokenBatchNorm

Result = TypeVar("Result")

PATIENCE = timedelta(hours=1)
"""How long a process waits for the others; while teachers are made, they may be minutes apart."""


@dataclass(frozen=True)
class Processes:
    """The processes of a training."""

    rank: int = 0
    """Of this one."""
    count: int = 1
    local_rank: int = 0
    """Among those of this machine."""

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and reports."""
        return self.rank == 0


ALONE = Processes()


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The processes that ``torchrun`` started, which talk to each other within the block; otherwise this one alone.

    Args:
        device: as on the command line; GPUs talk through NCCL, CPUs through gloo.
    """
    if "WORLD_SIZE" not in os.environ or not dist.is_available():
        yield ALONE
        return
    gpu = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if gpu:
        torch.cuda.set_device(local_rank)
    store, rank, count = next(dist.rendezvous("env://", timeout=PATIENCE))
    fresh = dist.PrefixStore(meet(store, rank, count, PATIENCE), store)
    backend = "nccl" if gpu else "gloo"
    dist.init_process_group(backend, store=fresh, rank=rank, world_size=count, timeout=PATIENCE)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), local_rank)
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise ConnectionError("another process of the training failed, or was killed") from error
        raise
    finally:
        dist.destroy_process_group()


def started_again() -> bool:
    """Whether ``torchrun`` started these processes in place of others that failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def is_spread() -> bool:
    """Whether there are several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def total(x: Tensor) -> Tensor:
    """The sum of a tensor over all processes, with gradients: that of each process gets to every other."""
    found: Tensor = _Total.apply(x) if is_spread() else x
    return found


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        found = x.clone()
        dist.all_reduce(found)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        found = grad.contiguous().clone()
        dist.all_reduce(found)
        return found


def wait_for_all() -> None:
    """Goes on when all processes have come here."""
    if is_spread():
        dist.barrier()


def from_first(make: Callable[[], Result]) -> Result:
    """What the first process makes, in all of them."""
    if not is_spread():
        return make()
    made: list[Any] = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(made, src=0)
    found: Result = made[0]
    return found


class SpreadBatchNorm(TokenBatchNorm):
    """A `TokenBatchNorm` whose statistics are those of the tokens of all processes.

    PyTorch's SyncBatchNorm, which the layer can be converted to, is for GPUs only.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, C]`` -> the same shape."""
        if not (self.training and is_spread()):
            return super().forward(x)
        values = x.float()
        count = total(torch.full((), float(x.shape[0] * x.shape[1]), device=x.device))
        mean = total(values.sum((0, 1))) / count
        centred = values - mean
        variance = total(centred.square().sum((0, 1))) / count
        if self.track_running_stats:
            self._track(mean.detach(), variance.detach(), int(count), self._count())
        scaled = centred * (variance + self.eps).rsqrt()
        return (scaled * self.weight + self.bias).to(x.dtype)


def spread_batch_norms(network: nn.Module) -> None:
    """Makes every `TokenBatchNorm` of a network a `SpreadBatchNorm` with the same parameters and buffers."""
    for module in network.modules():
        for name, child in module.named_children():
            if type(child) is TokenBatchNorm:
                spread = SpreadBatchNorm(child.num_features, child.eps, child.momentum)
                spread._parameters, spread._buffers = child._parameters, child._buffers
                spread.train(child.training)
                setattr(module, name, spread)
