"""How tensors are handed to the compiled extension: addresses, sizes and strides (see csrc/abi.h).

Activations go as they are, with any strides and in their own dtype. Parameters and statistics go as contiguous arrays
of the arithmetic dtype, float32 (float64 for float64 activations), but for what `parameter_dtypes` says; gradients of
parameters come back in that dtype and are rounded once to the parameter's own. All of a call goes as one flat tuple of
numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from msformer_kernels.core.precision import arithmetic_dtype, cpu_float32_precision

if TYPE_CHECKING:
    from msformer_kernels.core.operator import Operator

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
PRECISIONS = {"highest": 0, "high": 1, "medium": 2}
BY_SHAPE, MANY_TOKENS, FEW_TOKENS = 0, 1, 2
FORM = BY_SHAPE
"""How images are worked on: as was measured to be the better way for their shape, or always in one way."""
NO_ACTIVATION = (0,) * 6


def settings(x: Tensor, matrices: Sequence[Tensor] = ()) -> tuple[int, int]:
    """How many threads a kernel gets, and how exact its products are, as every entry point takes them: "medium", which
    rounds to bfloat16, where the activations are bfloat16 or all weights of linear layers are, as under autocast; else
    as the user allows it for float32."""
    narrow = x.dtype is torch.bfloat16 or (len(matrices) > 0 and all(m.dtype is torch.bfloat16 for m in matrices))
    return torch.get_num_threads(), PRECISIONS["medium" if narrow else cpu_float32_precision()]


def activation(x: Tensor) -> tuple[int, ...]:
    """(address, dtype, batch, head, token and channel stride) of `[B, N, C]` or `[B, heads, N, D]`."""
    strides = x.stride()
    if len(strides) == 3:
        return (x.data_ptr(), DTYPES[x.dtype], strides[0], 0, strides[1], strides[2])
    return (x.data_ptr(), DTYPES[x.dtype], *strides)


def memory_activation(x: Tensor | None) -> tuple[int, ...]:
    """`activation` of memory tokens `[heads, M, D]`, which are the same for every image."""
    return NO_ACTIVATION if x is None else (x.data_ptr(), DTYPES[x.dtype], 0, *x.stride())


def memory_arguments(key: Tensor | None, value: Tensor | None) -> tuple[int, ...]:
    """How many memory tokens there are, and their keys and values."""
    return (0 if key is None else key.shape[1], *memory_activation(key), *memory_activation(value))


def mask_argument(mask: Tensor | None) -> tuple[int, ...]:
    """(address, batch stride, token stride) of a boolean `[B, N]`; zeros without a mask."""
    return (0, 0, 0) if mask is None else (mask.data_ptr(), *mask.stride())


def addresses(tensors: Iterable[Tensor | None]) -> list[int]:
    """Of contiguous tensors; 0 for none, or for one without elements."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def aligned(x: Tensor) -> Tensor:
    """A contiguous tensor on a cache line, as kernels want what they work on where it lies; memory that PyTorch
    allocates is."""
    return x if x.data_ptr() % 64 == 0 else x.clone()


def parameter_dtypes(operator: Operator[Any], call: Any, few_tokens: bool = False) -> list[torch.dtype]:
    """In which dtypes a kernel takes `operator.parameters`: the arithmetic dtype. Of few tokens it takes the
    weights of linear layers as they are, where all are bfloat16: converting them would take longer than products."""
    wide = arithmetic_dtype(call.x.dtype)
    all_narrow = all(m.dtype is torch.bfloat16 for m in operator.matrices_of(call))
    narrow = few_tokens and wide is torch.float32 and all_narrow
    return [torch.bfloat16 if narrow and name in operator.matrices else wide for name in operator.parameters]


def contiguous(parameters: Sequence[Tensor | None], dtypes: Iterable[torch.dtype]) -> list[Tensor | None]:
    """Parameters as kernels take them; the caller keeps the list alive while the kernel runs."""
    return [
        p if p is None or (p.dtype is dtype and p.is_contiguous()) else p.to(dtype).contiguous()
        for p, dtype in zip(parameters, dtypes, strict=False)
    ]


def empty_gradients(parameters: Sequence[Tensor | None], dtypes: Iterable[torch.dtype], like: Tensor) -> list[Tensor]:
    """Room for the gradients in the dtypes of the parameters; zero-size for an absent one."""
    return [
        like.new_empty(0 if p is None else p.shape, dtype=dtype) for p, dtype in zip(parameters, dtypes, strict=False)
    ]


def rounded(gradients: Sequence[Tensor], parameters: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Gradients in the dtypes of their parameters."""
    return tuple(
        [g if p is None or p.dtype is g.dtype else g.to(p.dtype) for g, p in zip(gradients, parameters, strict=True)]
    )
