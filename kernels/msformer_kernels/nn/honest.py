"""Whether a layer may take the parameters of its submodules in place of calling them, and how it explains that.

A fused layer never calls its `fc1`: it hands the weight to an operator. That is the same only while `fc1` is the plain
module that the layer was built with. Adapters, hooks, parametrizations, weight and spectral norm, pruning,
quantization, offloading and the sharding of single layers replace it or act when it is called; then the layer calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as modules

from msformer_kernels.core.backends import Explanation, explain
from msformer_kernels.core.precision import autocast_enabled
from msformer_kernels.ops.mix_ffn.reference import KERNEL_SIZES

Check = Callable[[Any], "str | None"]
"""Says why a submodule must be called; None if its parameters may be taken."""
Parts = Sequence[tuple[str, Any, Check]]
"""The submodules of a layer: name, module, check."""

_FORWARD: dict[type[nn.Module], Any] = {built: built.forward for built in (nn.Linear, nn.Conv2d, nn.LayerNorm)}
_CONV_FORWARD = nn.Conv2d._conv_forward
_READABLE = (nn.Parameter, Tensor, type(None), FakeTensor, FunctionalTensor)


Layer = TypeVar("Layer", bound=type[nn.Module])


def built_here(kind: Layer) -> Layer:
    """A decorator for what layers are built of: if its forward is replaced later, it is called."""
    _FORWARD[kind] = kind.forward
    return kind


def why_any_is_called() -> str | None:
    """Why every module must be called: hooks that PyTorch runs at all of them."""
    hooks = len(modules._global_forward_hooks) + len(modules._global_forward_pre_hooks)
    if hooks + len(modules._global_backward_hooks) + len(modules._global_backward_pre_hooks) > 0:
        return "hooks for all modules are registered"
    return None


def why_called(module: Any, built: type[nn.Module]) -> str | None:
    """Why a submodule must be called where a layer was built with one of class `built`."""
    if type(module) is not built:
        return f"is a {type(module).__name__}, not a {built.__name__}"
    own = module.__dict__
    # torch.compile guards the lengths of these entries, but not attributes of these names
    hooks = len(own["_forward_hooks"]) + len(own["_forward_pre_hooks"])
    if hooks + len(own["_backward_hooks"]) + len(own["_backward_pre_hooks"]) > 0:
        return "has hooks"
    _ = module.forward  # which torch.compile guards, unlike the entry
    if "forward" in own or built.forward is not _FORWARD[built]:
        return "has another forward"
    if module._compiled_call_impl is not None:
        return "is compiled"
    return None


def why_linear(module: Any) -> str | None:
    return why_called(module, nn.Linear) or why_parameters(module)


def why_layer_norm(module: Any) -> str | None:
    return why_called(module, nn.LayerNorm) or why_parameters(module)


def why_pointwise(module: Any) -> str | None:
    """Of a 1x1 convolution."""
    return _why_convolution_is_called(module) or _why_other_convolution(module, (1, 1), (0, 0), 1)


def why_depthwise(module: Any) -> str | None:
    """Of a depthwise convolution of a size that `mix_ffn` takes, zero padded to keep the size of the image."""
    why = _why_convolution_is_called(module)
    if why is not None:
        return why
    size = module.kernel_size[0] if module.kernel_size[0] in KERNEL_SIZES else KERNEL_SIZES[0]
    return _why_other_convolution(module, (size, size), (size // 2, size // 2), module.out_channels)


def why_parameters(module: Any) -> str | None:
    """Why the weight and bias of a module are no tensors for kernels."""
    for tensor in weight_and_bias(module):
        if type(tensor) not in _READABLE:
            return f"has a parameter of type {type(tensor).__name__}"
        if tensor is not None and tensor.layout is not torch.strided:
            return f"has a parameter of layout {tensor.layout}"
    return None


def _why_convolution_is_called(module: Any) -> str | None:
    why = why_called(module, nn.Conv2d)
    if why is None:
        _ = module._conv_forward  # see `why_called`; tools for seamless images replace it
        if "_conv_forward" in module.__dict__ or nn.Conv2d._conv_forward is not _CONV_FORWARD:
            return "has another forward"
    return why or why_parameters(module)


def _why_other_convolution(
    module: nn.Conv2d, size: tuple[int, int], padding: tuple[int, int], groups: int
) -> str | None:
    if (
        module.kernel_size == size
        and module.padding == padding
        and module.groups == groups
        and module.stride == (1, 1)
        and module.dilation == (1, 1)
        and module.padding_mode == "zeros"
        and (groups == 1 or groups == module.in_channels)
    ):
        return None
    return f"is another convolution: {module.extra_repr()}"


def why_other_dtype(module: Any, dtype: torch.dtype, device_type: str) -> str | None:
    """Why a norm of another dtype than its input, as one that stays in float32, must be called."""
    weight = weight_and_bias(module)[0]
    if weight is None or weight.dtype == dtype or autocast_enabled(device_type):
        return None
    return f"is {weight.dtype}, its input {dtype}"


def weight_and_bias(module: nn.Module) -> tuple[Any, Any]:
    """Of a Linear, Conv2d or LayerNorm."""
    found = module._parameters
    if len(found) == 2 and "weight" in found and "bias" in found:  # an attribute of a module costs ten times as much
        return found["weight"], found["bias"]
    return module.weight, module.bias


def why_not_fused(parts: Parts) -> str | None:
    """Why the submodules of a layer must be called, of the first one that must; None if the layer may be fused."""
    if (reason := why_any_is_called()) is not None:
        return reason
    for name, module, check in parts:
        if (reason := check(module)) is not None:
            return f"{name} {reason}"
    return None


def convolved(convolution: nn.Module, tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Tokens ``[B, N, C]`` of an image of this size through a module for images, called with ``[B, C, H, W]``."""
    image = tokens.transpose(1, 2).unflatten(2, size)
    if tokens.numel() > 0:
        return convolution(image).flatten(2).transpose(1, 2)
    # a convolution refuses an empty image; a pixel of zeros gives the channels, and zero gradients to all parameters
    pixel = image.new_zeros(1, image.shape[1], 1, 1) + tokens.sum()
    found = convolution(pixel).flatten(2).transpose(1, 2)
    return found[: tokens.shape[0], : tokens.shape[1]].expand(tokens.shape[0], tokens.shape[1], -1)


@dataclass(frozen=True)
class LayerExplanation:
    """How a layer runs: fused, or by calling its submodules, and why. Prints as lines of text."""

    layer: str
    fused: bool
    """Whether the layer hands the parameters of all its submodules to one operator (a block: to two)."""
    reasons: dict[str, str] = field(default_factory=dict)
    """By the names of submodules, why they are called; of the norm, too, which leaves the rest of a layer fused."""
    operators: dict[str, Explanation] = field(default_factory=dict)
    """The operators that it uses, and the backends that they get."""
    parts: dict[str, LayerExplanation] = field(default_factory=dict)
    """Of a block: its layers."""

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> list[str]:
        lines = [f"{self.layer}: {'fused' if self.fused else 'not fused, its submodules are called'}"]
        lines += [f"  {name}: {reason}" for name, reason in self.reasons.items()]
        lines += [f"  {str(found).splitlines()[0]}" for found in self.operators.values()]
        for name, part in self.parts.items():
            first, *rest = part._lines()
            lines += [f"  {name}: {first}", *(f"  {line}" for line in rest)]
        return lines


def explained(
    layer: nn.Module,
    parts: Parts,
    fused: str,
    otherwise: Sequence[str],
    norm: nn.Module | None,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    ask: Callable[[str | torch.device, torch.dtype, str], Explanation] = explain,
) -> LayerExplanation:
    """Of a layer that is one operator, `fused`, or uses others where it calls its parts. `ask` explains an operator for
    a device and dtype."""
    first = next(layer.parameters(), torch.empty(0))
    where, kind = first.device if device is None else device, first.dtype if dtype is None else dtype
    checks: dict[str, str | None] = {"every module": why_any_is_called()}
    checks |= {name: check(module) for name, module, check in parts}
    is_fused = all(reason is None for reason in checks.values())
    if norm is not None:
        checks["norm"] = why_layer_norm(norm) or why_other_dtype(norm, kind, torch.device(where).type)
    reasons = {name: reason for name, reason in checks.items() if reason is not None}
    operators = {name: ask(where, kind, name) for name in ([fused] if is_fused else otherwise)}
    return LayerExplanation(type(layer).__name__, is_fused, reasons, operators)
