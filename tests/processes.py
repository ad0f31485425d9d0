"""Tests in several processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing


def run_in_processes(function: Callable[..., None], *arguments: Any, count: int = 2) -> None:
    """`function(rank, *arguments)` in each process; the first error is raised. They are forks of one that has imported
    what takes seconds, and calculated nothing."""
    multiprocessing.set_forkserver_preload(["torch._dynamo", function.__module__])
    torch.multiprocessing.start_processes(function, arguments, nprocs=count, start_method="forkserver")
