"""The all-MLP decoder of SegFormer (Xie et al., NeurIPS 2021): features of several scales become one map.

A linear layer for each scale, bilinear upsampling to the largest, concatenation, a 1x1 convolution that fuses them,
whatever follows. Upsampling is linear in each channel and its weights add up to one, so it commutes with what mixes
channels: ``fuse(cat(up(L_i x_i + b_i))) = sum up(F_i L_i x_i + F_i b_i)``, with `F_i` the fuse's columns of scale i.
This is exact, and the widest product by far is done at each scale's own resolution; nothing is concatenated.
"""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from msformer_kernels.core.precision import arithmetic_dtype, autocast_enabled
from msformer_kernels.patching.structures.common import (
    CHANNELS_LAST,
    NOTHING,
    Found,
    Plan,
    arguments_of,
    features,
    is_pointwise,
    layers_of,
    weight_and_bias,
)

STRIDE = 4
"""Of the largest features, where the image itself is the first of the list (segmentation_models_pytorch)."""


@dataclass(frozen=True)
class AllMLPDecoderPlan(Plan):
    """``after(fuse(cat(up(project_i(x_i)))))`` of a list of images ``[B, C_i, H_i, W_i]``, the largest first."""

    projections: tuple[str, ...]
    """Of the features from the largest on."""
    fuse: str
    after: tuple[str, ...]
    largest_first: bool
    """Whether concatenation begins with the largest features."""
    image_first: bool
    """Whether the list begins with the image, whose size says that of the result, and the features come last."""

    title: ClassVar[str] = "all-MLP decoder"

    @property
    def probe_sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of the largest features, so that both orders of products are proved."""
        return (9, 12), (4, 7)

    def _fits(self, x: Any, *rest: Any) -> bool:
        count = len(self.projections)
        if not isinstance(x, (list, tuple)) or len(x) < count or not all(map(super()._fits, x)):
            return False
        before = x[: len(x) - count]
        # segmentation_models_pytorch has an empty entry where an encoder has no features of half the size
        return len(before) in (1, 2) and all(y.shape[1] == 0 for y in before[1:]) if self.image_first else not before

    def run(self, module: nn.Module, x: Any, *rest: Any) -> Any:
        height, width = (side // STRIDE if self.image_first else side for side in x[0].shape[2:])
        found = self._fused_maps(module, x[-len(self.projections) :], (height, width))
        for name in self.after:
            found = module.get_submodule(name)(found)
        return found

    def _fused_maps(self, module: nn.Module, images: Any, size: tuple[int, int]) -> Tensor:
        """``[B, out, *size]``; sums of 16-bit maps are kept in float32."""
        sums: dict[tuple[int, ...], Tensor] = {}
        last = self.layout == CHANNELS_LAST and images[0].shape[0] > 1  # the result for one image is contiguous
        weights = self._weights(module, images[0])
        maps = [_mapped(image, *of_scale, last) for image, of_scale in zip(images, weights, strict=True)]
        for found in maps:
            at = tuple(found.shape[2:])
            sums[at] = sums[at] + found if at in sums else found
        up = [m if at == size else _upsampled(m, size) for at, m in sums.items()]
        total = up[0]
        for other in up[1:]:
            total = total + other
        return total.to(_product_dtype(images[0]))

    def _weights(self, module: nn.Module, like: Tensor) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Of each scale the fuse's columns, the projection's weight, and a bias; the smallest scale has all biases."""
        fuse, bias = weight_and_bias(module, self.fuse)
        layers = [weight_and_bias(module, name) for name in self.projections]
        in_order = layers if self.largest_first else layers[::-1]
        columns = list(fuse.split([weight.shape[0] for weight, _ in in_order], 1))
        columns = columns if self.largest_first else columns[::-1]
        with _without_autocast(like.device.type):
            wide = arithmetic_dtype(fuse.dtype)
            biases = [c.to(wide) @ b.to(wide) for c, (_, b) in zip(columns, layers, strict=True) if b is not None]
        if bias is not None:
            biases.append(bias.to(wide))
        total = sum(biases[1:], biases[0]) if biases else None
        last = len(layers) - 1
        return [(c, w, total if i == last else None) for i, (c, (w, _)) in enumerate(zip(columns, layers, strict=True))]

    def fused(self) -> tuple[str, ...]:
        return (*self.projections, self.fuse)

    def called(self) -> tuple[str, ...]:
        return self.after

    def channels(self, module: nn.Module) -> int:
        return features(module.get_submodule(self.projections[0]))[1]

    def probe_shapes(self, module: nn.Module, height: int, width: int) -> tuple[tuple[int, ...], ...]:
        shapes = []
        for at, name in enumerate(self.projections):
            shapes.append((2, features(module.get_submodule(name))[1], -(-height // 2**at), -(-width // 2**at)))
        if self.image_first:
            empty = [(2, 0, 2 * height, 2 * width)] * ((height, width) == self.probe_sizes[-1])
            shapes = [(2, 3, STRIDE * height, STRIDE * width), *empty, *shapes]
        return tuple(shapes)

    def tensor_of(self, x: Any) -> Tensor:
        found: Tensor = x[-1]
        return found

    def as_argument(self, tensors: list[Tensor]) -> Any:
        return tensors

    def options(self) -> str:
        return f"{self.fuse} before upsampling, of {len(self.projections)} scales"


def _product_dtype(image: Tensor) -> torch.dtype:
    """That of a product with this tensor; autocast leaves float64 as it is."""
    kind = image.device.type
    narrow = autocast_enabled(kind) and image.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if narrow else image.dtype


def _without_autocast(kind: str) -> AbstractContextManager[Any]:
    """Weights are multiplied in float32. The meta device knows no autocast."""
    return torch.autocast(kind, enabled=False) if autocast_enabled(kind) else nullcontext()


def _mapped(image: Tensor, columns: Tensor, weight: Tensor, bias: Tensor | None, channels_last: bool) -> Tensor:
    """``columns @ weight @ image + bias``, ``[B, out, H, W]`` in the dtype of sums; the two weights first where that is
    less work."""
    tokens, wide = image.flatten(2), arithmetic_dtype(image.dtype)
    if tokens.shape[0] * tokens.shape[2] >= weight.shape[1]:
        with _without_autocast(image.device.type):
            merged = columns.to(wide) @ weight.to(wide)
        factors = [merged.to(_product_dtype(image))]
        tokens = tokens.to(_product_dtype(image))
    else:
        factors = [weight, columns]
    for factor in factors:
        tokens = (tokens.mT @ factor.mT).mT if channels_last else factor @ tokens
    found = tokens.to(wide)
    if bias is not None:
        found = found + bias[:, None]
    return found.unflatten(2, image.shape[2:])


def _upsampled(image: Tensor, size: tuple[int, int]) -> Tensor:
    found: Tensor = nn.functional.interpolate(image, size=size, mode="bilinear", align_corners=False)
    return found


def all_mlp_decoder_plans(module: nn.Module, children: dict[str, Plan]) -> Found:
    """See `Search`. Alike is what has a layer for each scale and one that fuses as many channels."""
    arguments, lists = arguments_of(module), [n for n, c in module.named_children() if isinstance(c, nn.ModuleList)]
    if children or arguments.convention != "image" or len(lists) != 1 or module._parameters:
        return NOTHING
    scales = list(module.get_submodule(lists[0]).named_children())
    layers = layers_of(module)
    names = [name for name in layers if name.startswith(f"{lists[0]}.")]
    others = [name for name in layers if name not in names]
    if len(scales) < 2 or len(names) != len(scales) or not others or not all(is_pointwise(layers[n]) for n in names):
        return NOTHING
    fuse = others[0]
    wide = sum(features(layers[name])[0] for name in names)
    if not is_pointwise(layers[fuse]) or features(layers[fuse])[1] != wide:
        return NOTHING
    leaves = [name for name, child in module.named_modules() if name and not child._modules]
    after = tuple(leaves[leaves.index(fuse) + 1 :])
    plans = [
        AllMLPDecoderPlan(arguments, tuple(order), fuse, after, largest_first, image_first)
        for order, largest_first, image_first in itertools.product((names, names[::-1]), (False, True), (False, True))
    ]
    return Found(tuple(plans), alike=True)
