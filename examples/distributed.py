"""Data-parallel training with torchrun: two processes that see half of a batch each end with the gradients of one.

Run: ``torchrun --nproc-per-node 2 examples/distributed.py`` (needs ``pip install msformer``).
On CPUs the processes talk through gloo, on GPUs through NCCL.
Takes: 8 s of CPU time, most of it the imports of three processes.
Prints: from the first process, the loss of a few steps, and the largest difference between the gradients of
DistributedDataParallel and those of one process that sees the whole batch; where they differ by more than rounding it
ends with an error.
"""

import copy
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from msformer_kernels import EfficientTransformerBlock

SIZE = 16


class Classifier(nn.Module):
    """Two classes of images ``[B, 3, SIZE, SIZE]``: pixels as tokens, two blocks, the mean of the tokens."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(3, width)
        self.blocks = nn.ModuleList(EfficientTransformerBlock(width, num_heads=2) for _ in range(2))
        self.head = nn.Linear(width, 2)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images.flatten(2).transpose(1, 2))
        for block in self.blocks:
            tokens, _ = block(tokens, SIZE, SIZE)
        return self.head(tokens.mean(1))


def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(images), labels)


def main() -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, count = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)  # the same images and weights everywhere
    images, labels = torch.randn(8 * count, 3, SIZE, SIZE, device=device), torch.randint(2, (8 * count,), device=device)
    images += labels[:, None, None, None]
    alone = Classifier().to(device)
    together = DistributedDataParallel(copy.deepcopy(alone), device_ids=[device.index] if on_gpu else None)
    optimizer = torch.optim.AdamW(together.parameters(), lr=1e-3)

    mine = slice(8 * rank, 8 * (rank + 1))
    loss(alone, images, labels).backward()  # one process, the whole batch
    for step in range(5):
        found = loss(together, images[mine], labels[mine])
        found.backward()  # averages the gradients of all processes
        if step == 0:
            pairs = list(zip(alone.parameters(), together.module.parameters(), strict=True))
            difference = max((a.grad - b.grad).abs().max().item() for a, b in pairs)
            largest = max(a.grad.abs().max().item() for a, _ in pairs)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"step {step}, loss {found.item():.3f}")
    if rank == 0:
        print(f"gradients of {count} processes and of one differ by {difference:.1e}, of up to {largest:.1e}")
    dist.destroy_process_group()
    if difference > 1e-5 * max(largest, 1):
        raise SystemExit("the gradients are not those of one process")


if __name__ == "__main__":
    main()
