"""A patched model in DDP and FSDP2, in one process; a line for each part that holds. Run as a script."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import msformer_kernels as kernels
from tests.kernels.patching.test_instances import Model, X, operators


def main(folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    torch.manual_seed(0)
    model = Model()
    plain = copy.deepcopy(model)
    report = kernels.patch(model)
    expected = torch.autograd.grad(plain(X).square().sum(), list(plain.parameters()))

    DistributedDataParallel(model)(X).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-4)
    assert operators(model) == 2
    print("ddp")

    model.zero_grad()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    model(X).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), gradient, atol=1e-4, rtol=1e-4)
    assert operators(model) == 2
    print("fsdp")

    classes = [type(module) for module in model.modules()]
    with pytest.raises(RuntimeError, match=r"blocks\.0 is a FSDPTupleBlock now"):
        report.undo()
    assert [type(module) for module in model.modules()] == classes
    print("undo")

    fully_shard(plain)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kernels.patch(plain)
    assert any("DTensor" in str(w.message) for w in caught), [str(w.message) for w in caught]
    print("refuse")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]).as_posix())
