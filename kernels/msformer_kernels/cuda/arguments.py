"""How tensors are handed to the CUDA kernels: addresses and strides (see csrc/cuda/api.h).

Activations go as they are, with any strides. Parameters go contiguous, in the dtype of the activations or float32;
their gradients are written in the dtype of the parameter. All of a call goes as one flat tuple of numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from msformer_kernels.core.backends import cuda_library
from msformer_kernels.core.precision import tf32_allowed

_ENGINES = {torch.bfloat16: 0, torch.float16: 1}
_TF32, _FLOAT32 = 2, 3
NO_HEADS = (0,) * 5


def engine(dtype: torch.dtype) -> int:
    """How products are done for activations of a dtype (`Engine` in csrc/cuda/api.h): float32 ones in tf32 where
    PyTorch allows it for products of matrices, else in three parts of bfloat16, with the accuracy of float32."""
    found = _ENGINES.get(dtype)
    return found if found is not None else _TF32 if tf32_allowed() else _FLOAT32


def library(x: Tensor) -> ModuleType:
    """The compiled kernels for tensors like x, of the GPU or emulated."""
    return cuda_library(x.device.type)


def stream(x: Tensor) -> int:
    """The current stream of x's device; the emulation has none."""
    return torch._C._cuda_getCurrentRawStream(x.device.index) if x.is_cuda else 0


def tokens(x: Tensor) -> tuple[int, ...]:
    """(address, batch stride, token stride, channel stride) of `[B, N, C]`."""
    return (x.data_ptr(), *x.stride())


def heads(x: Tensor) -> tuple[int, ...]:
    """(address, batch stride, head stride, token stride, channel stride) of `[B, heads, N, D]`."""
    return (x.data_ptr(), *x.stride())


def mask_argument(mask: Tensor | None) -> tuple[int, ...]:
    """(address, batch stride, token stride) of a boolean `[B, N]`; zeros without a mask."""
    return (0, 0, 0) if mask is None else (mask.data_ptr(), *mask.stride())


def address(x: Tensor | None) -> int:
    """Of a contiguous tensor; 0 for none."""
    return 0 if x is None else x.data_ptr()


def scratch(size: int, like: Tensor) -> Tensor:
    """`size` bytes of memory on the device of a tensor."""
    return like.new_empty(size, dtype=torch.uint8)


def handed_over(parameters: Sequence[Tensor | None], x: Tensor) -> list[Tensor | None]:
    """Parameters as the kernels take them; the caller keeps the list alive while they are launched."""
    return [
        p
        if p is None or (p.is_contiguous() and p.dtype in (x.dtype, torch.float32))
        else p.to(p.dtype if p.dtype is x.dtype else torch.float32).contiguous()
        for p in parameters
    ]


def empty_gradients(parameters: Sequence[Tensor | None], x: Tensor) -> list[Tensor]:
    """Room for the gradients of parameters that are `handed_over`, in their dtypes; zero-size and float32 for an absent
    one."""
    return [x.new_empty(0, dtype=torch.float32) if p is None else p.new_empty(p.shape) for p in parameters]


def as_given(gradients: Sequence[Tensor], parameters: Sequence[Tensor | None]) -> list[Tensor]:
    """Gradients in the dtypes of the parameters of the call."""
    return [g if p is None or g.dtype is p.dtype else g.to(p.dtype) for g, p in zip(gradients, parameters, strict=True)]


def with_width(tensors: Sequence[Tensor | None]) -> list[Any]:
    """(address, whether float32) of each, one after the other; 0 for none."""
    flat: list[Any] = []
    for t in tensors:
        flat += (0, False) if t is None or t.numel() == 0 else (t.data_ptr(), t.dtype is torch.float32)
    return flat
