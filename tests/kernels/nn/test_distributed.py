"""Layers under FSDP2 and as DTensors, in two processes."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor

import msformer_kernels as kernels
from tests.processes import run_in_processes


def leaves(block: nn.Module) -> list[nn.Module]:
    return [module for module in block.modules() if not list(module.children())]


SHARDED: dict[str, Callable[[Any], list[nn.Module]]] = {
    "whole": lambda block: [block],
    "layers": lambda block: [block.attn, block.mlp, block],
    "submodules": lambda block: [*leaves(block), block],
    "holder_and_norms": lambda block: [block.mlp.dwconv, block.norm1, block.norm2, block],
}


def model_and_images() -> tuple[kernels.EfficientTransformerBlock, Tensor]:
    torch.manual_seed(0)
    return kernels.EfficientTransformerBlock(8, num_heads=2), torch.randn(4, 12, 8)


def loss(output: Tensor, context: Tensor) -> Tensor:
    return output.square().mean() + context.square().mean()


def check_sharded(kind: str, block: Any, x: Tensor, mesh: DeviceMesh) -> tuple[Tensor, Tensor]:
    for module in SHARDED[kind](block):
        fully_shard(module, mesh=mesh)
    output, context = block(x, 3, 4)
    loss(output, context).backward()
    return output, context


def check_distributed(kind: str, block: Any, x: Tensor, mesh: DeviceMesh) -> tuple[Tensor, Tensor]:
    placement = Shard(0) if kind == "batch" else Replicate()
    distribute_module(block, mesh)
    output, context = block(distribute_tensor(x, mesh, [placement]), 3, 4)
    assert output.placements == (placement,)
    loss(output, context).backward()
    return output.full_tensor(), context.full_tensor()


CHECKS = {**dict.fromkeys(SHARDED, check_sharded), "replicated": check_distributed, "batch": check_distributed}


def check(kind: str, mesh: DeviceMesh) -> None:
    block, x = model_and_images()
    expected = block(x, 3, 4)
    other = copy.deepcopy(block)
    loss(*expected).backward()
    torch.testing.assert_close(CHECKS[kind](kind, other, x, mesh), expected)
    for (name, parameter), own in zip(block.named_parameters(), other.parameters(), strict=True):
        gradient: Any = own.grad
        torch.testing.assert_close(
            gradient.full_tensor(), parameter.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{kind}, {n}: {m}"
        )


def check_synchronized_statistics() -> None:
    norm = nn.SyncBatchNorm.convert_sync_batchnorm(kernels.TokenBatchNorm(8))
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
        norm(model_and_images()[1])  # as PyTorch's own, rather than statistics of one process


def _run(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for kind in CHECKS:
        check(kind, mesh)
    check_synchronized_statistics()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads now and then abort the process while the interpreter shuts down


@pytest.mark.filterwarnings("ignore")
def test_two_processes(tmp_path: Path) -> None:
    """Outputs and gradients are those of one."""
    run_in_processes(_run, str(tmp_path / "store"))
