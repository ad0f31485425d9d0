"""The declaration of ``msformer::mix_ffn``.

The backward needs nothing but the inputs. Where images have few tokens, nearly all of the time goes into matrix
products, and the hidden tensor is small. There the op returns it, too, as `[B, N, hidden]` in front of its activation,
so that the backward on the CPU does not make it again; rounded, if the activations are bfloat16. Elsewhere that tensor
has no tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msformer_kernels.core.backends import cuda_shared_memory
from msformer_kernels.core.operator import Operator
from msformer_kernels.core.precision import arithmetic_dtype
from msformer_kernels.core.registration import cast_output
from msformer_kernels.native import arguments
from msformer_kernels.ops.mix_ffn.reference import mix_ffn

FEW_TOKENS = 3 << 18
"""Hidden values of an image, at most, for its tokens to be few; above that, going strip by strip measures faster."""
GATED_MULTIPLE = 16
"""Of which the CPU kernels want the halves of gated hidden channels to be one (csrc/abi.h)."""


def has_few_tokens(call: Any) -> bool:
    """Whether the CPU kernels work on whole images, layer after layer, instead of strip by strip."""
    if arguments.FORM == arguments.BY_SHAPE:
        return bool(_kept_tokens(call) > 0)
    return bool(arguments.FORM == arguments.FEW_TOKENS)


def _kept_tokens(call: Any) -> Any:
    """All tokens of an image if they are few, else none; of symbolic sizes an expression, which is not decided on."""
    tokens, hidden = call.x.shape[1], call.fc1_weight.shape[0]
    return tokens * torch.sym_min(1, FEW_TOKENS // torch.sym_max(1, tokens * hidden))


def room_for_hidden(call: Any) -> Tensor:
    """An empty tensor like the op's second output."""
    hidden = call.fc1_weight.shape[0]
    if call.gated:
        hidden = 2 * (hidden // 2 + missing_of_half(call))
    kept: Any = 0
    if call.x.device.type == "cpu":
        kept = _kept_tokens(call) if arguments.FORM == arguments.BY_SHAPE else call.x.shape[1] * has_few_tokens(call)
    dtype = torch.bfloat16 if call.x.dtype is torch.bfloat16 else arithmetic_dtype(call.x.dtype)
    return call.x.new_empty(call.x.shape[0], kept, hidden, dtype=dtype)


def nothing_kept(call: Any) -> Tensor:
    """The second output of a backend that does not keep it: infinite, for no gradients are better than wrong ones."""
    return room_for_hidden(call).fill_(float("inf"))


def missing_of_half(call: Any) -> int:
    """How many channels a half of a gated call lacks for the CPU kernels."""
    return -(call.fc1_weight.shape[0] // 2) % GATED_MULTIPLE if call.gated else 0


def _fake(call: Any) -> tuple[Tensor, ...]:
    return call.x.new_empty(call.x.shape), room_for_hidden(call)


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
    state=("hidden",),
    fake=_fake,
    products=_products,
    served_by=("native", "cuda", "triton"),
    matrices=("fc1_weight", "fc2_weight"),
    autocast=cast_output,
    limits={"cuda": _needs_memory, "triton": _needs_hidden_channels},
)
