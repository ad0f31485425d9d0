"""The declaration of ``msformer::mix_ffn``. The backward needs nothing but the inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msformer_kernels.core.backends import cuda_shared_memory
from msformer_kernels.core.operator import Operator
from msformer_kernels.core.registration import cast_output
from msformer_kernels.ops.mix_ffn.reference import mix_ffn


def _fake(call: Any) -> tuple[Tensor, ...]:
    return (call.x.new_empty(call.x.shape),)


def _products(call: Any) -> int:
    return call.x.shape[:2].numel() * (call.fc1_weight.numel() + call.dw_weight.numel() + call.fc2_weight.numel())


_NARROW_MEMORY = 128 << 10


def _needs_three_taps_and_no_gate(call: Any) -> str | None:
    """Why the kernels of a GPU do not take a call; None if they do."""
    if call.gated:
        return "gated is True, its kernels have no gate"
    if (size := call.dw_weight.shape[2]) != 3:
        return f"dw_weight is {size}x{size}, its kernels take 3x3 alone"
    return None


def _needs_memory(call: Any) -> str | None:
    """Why the CUDA kernels do not take a call; None if they do."""
    if reason := _needs_three_taps_and_no_gate(call):
        return reason
    if call.inner_activation != "identity":
        return f"inner_activation is {call.inner_activation!r}, its kernels have none"
    found = cuda_shared_memory(call.x.device.type, call.x.device.index)
    if call.x.dtype == torch.float32 or found >= _NARROW_MEMORY:
        return None
    needed, kind = _NARROW_MEMORY >> 10, str(call.x.dtype).removeprefix("torch.")
    return f"its kernels for {kind} need {needed} KiB of shared memory (A100, H100, B200), this GPU has {found >> 10}"


def _needs_hidden_channels(call: Any) -> str | None:
    """Why the Triton kernels do not take a call; None if they do."""
    if call.fc1_weight.shape[0] == 0:
        return "its kernels take at least one hidden channel"
    return _needs_three_taps_and_no_gate(call)


OPERATOR = Operator(
    mix_ffn,
    outputs=("output",),
    fake=_fake,
    products=_products,
    served_by=("native", "cuda", "triton"),
    matrices=("fc1_weight", "fc2_weight"),
    autocast=cast_output,
    limits={"cuda": _needs_memory, "triton": _needs_hidden_channels},
)
