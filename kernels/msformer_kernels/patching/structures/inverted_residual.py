"""MixFFN with BatchNorms: the inverted residual of MobileNetV2 (Sandler et al., CVPR 2018), MBConv without
squeeze-excitation.

With running statistics, in evaluation mode, BatchNorm is an affine map of each channel. Folded into the layer before it
it leaves a MixFFN. The folding is done in every call, from the parameters and statistics as they are then, so training,
loading and averaging of weights never leave an old one behind.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from msformer_kernels.core.precision import arithmetic_dtype, autocast_enabled
from msformer_kernels.nn.honest import weight_and_bias
from msformer_kernels.patching.structures.common import NOTHING, Found, Plan, layers_of
from msformer_kernels.patching.structures.mix_ffn import MixFFNPlan, plans_of


@dataclass(frozen=True)
class InvertedResidualPlan(MixFFNPlan):
    """A MixFFN some of whose layers have a BatchNorm after them."""

    batch_norms: tuple[tuple[str, str], ...] = ()
    """Of these layers, the BatchNorms."""

    needs_example: ClassVar[str | None] = (
        "an inverted residual does not gain at every size; give `example` to measure it"
    )

    def weight_and_bias(self, module: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
        norm = dict(self.batch_norms).get(name)
        if norm is None:
            return super().weight_and_bias(module, name)
        return folded(module.get_submodule(name), module.get_submodule(norm))

    def compute(self, module: nn.Module, tokens: Tensor, *size: int, **options: Any) -> Tensor:
        """See `MixFFNPlan`. Folded weights are float32, and so are the products with them, of bfloat16 layers and under
        autocast, too: rounded once more they would shift whole gradients."""
        device = tokens.device.type
        if not autocast_enabled(device):
            wide = tokens if tokens.dtype.itemsize >= 4 else tokens.float()
            return super().compute(module, wide, *size, **options).to(tokens.dtype)
        dtype = tokens.dtype if tokens.dtype == torch.float64 else torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            wide = tokens if tokens.dtype.itemsize >= 4 else tokens.float()
            return super().compute(module, wide, *size, **options).to(dtype)

    def fused(self) -> tuple[str, ...]:
        return (*super().fused(), *self.evaluated())

    def evaluated(self) -> tuple[str, ...]:
        return tuple(norm for _, norm in self.batch_norms)

    def options(self) -> str:
        return f"{super().options()}, {', '.join(self.evaluated())} folded"


def folded(layer: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear layer or convolution with the BatchNorm after it, by its running statistics.

    They are float32, or float64 for a float64 layer.
    """
    weight, bias = weight_and_bias(layer)
    norm_weight, norm_bias = weight_and_bias(norm)
    dtype = arithmetic_dtype(weight.dtype)
    mean = norm._buffers["running_mean"].to(dtype)
    scale = (norm._buffers["running_var"].to(dtype) + norm.eps).rsqrt()
    if norm_weight is not None:
        scale = scale * norm_weight
    if bias is not None:
        mean = mean - bias
    shift = -mean * scale if norm_bias is None else torch.addcmul(norm_bias, mean, scale, value=-1)
    return weight * scale.view(-1, *[1] * (weight.dim() - 1)), shift


def inverted_residual_plans(module: nn.Module, children: dict[str, Plan]) -> Found:
    """See `Search`. Alike is what is alike without the BatchNorms."""
    layers = layers_of(module)
    norms = {name: layer for name, layer in layers.items() if isinstance(layer, _BatchNorm)}
    if not norms:
        return NOTHING
    found = plans_of(module, {name: layer for name, layer in layers.items() if name not in norms}, children)
    if not found.plans:
        return found
    for name, norm in norms.items():
        if norm.running_mean is None or norm.running_var is None:
            return Found(why_not=f"{name} has no running statistics, so it uses those of the batch", alike=True)
    plans: list[Plan] = []
    for plan in found.plans:
        assert isinstance(plan, MixFFNPlan)
        options = {field.name: getattr(plan, field.name) for field in fields(plan)}
        after = (plan.fc1, plan.convolution, plan.fc2)
        plans += (InvertedResidualPlan(**options, batch_norms=pairs) for pairs in _pairs(after, norms, layers))
    if not plans:
        return Found(why_not=f"not each of its BatchNorms ({', '.join(norms)}) can follow a layer", alike=True)
    return Found(tuple(plans), alike=True)


def _pairs(after: tuple[str, ...], norms: dict[str, Any], layers: dict[str, Any]) -> list[tuple[tuple[str, str], ...]]:
    """Ways to give each BatchNorm a layer of its width that it follows; that of the order of definition first."""
    ways = [tuple(zip(order, norms, strict=True)) for order in itertools.permutations(after, len(norms))]
    return [way for way in ways if all(len(layers[name].weight) == norms[norm].num_features for name, norm in way)]
