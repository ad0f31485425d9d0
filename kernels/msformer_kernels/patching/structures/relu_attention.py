"""Multi-scale linear attention of ReLU features (EfficientViT, Cai et al., ICCV 2023; the autoencoder of SANA).

One layer, or three, make query, key and value; convolutions aggregate them at further scales, whose results are further
heads. All of these are called as they are, and so is what comes after; only the attention between them is replaced.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from msformer_kernels.ops.efficient_attention import efficient_attention
from msformer_kernels.patching.structures.common import (
    NOTHING,
    Found,
    Plan,
    arguments_of,
    features,
    head_counts,
    is_pointwise,
    joined,
    layers_of,
)

EPS = (1e-15, 1e-5)
"""What may be added to the divisor where the module does not say it: EfficientViT's, timm's."""


@dataclass(frozen=True)
class ReluAttentionPlan(Plan):
    """``after(efficient_attention(q, k, v, normalization="relu")) [+ x]``; q, k, v of ``makes(x)`` and its scales."""

    makes: tuple[str, ...]
    scales: tuple[str, ...]
    after: tuple[str, ...]
    head_channels: int
    eps: float
    norm_takes_tokens: bool
    """Whether what follows a linear layer takes channels last as well."""
    residual: bool

    title: ClassVar[str] = "efficient_attention"
    needs_example: ClassVar[str | None] = (
        "attention of ReLU features does not gain at every size; give `example` to measure it"
    )

    def run(self, module: nn.Module, x: Tensor, *rest: Any) -> Any:
        height, width = x.shape[2:]
        made = [_called(module.get_submodule(name), x) for name in self.makes]
        qkv = made[0] if len(made) == 1 else torch.cat(made, 1)
        scales = [qkv, *(module.get_submodule(name)(qkv) for name in self.scales)]
        parts = torch.cat(scales, 1).unflatten(1, (-1, 3, self.head_channels)).flatten(4)  # [B, heads, 3, D, N]
        query, key, value = (part.transpose(2, 3) for part in parts.unbind(2))  # gradients are put together as they lie
        output, _ = efficient_attention(query, key, value, normalization="relu", eps=self.eps)
        image = self.laid(output.transpose(2, 3).flatten(1, 2).unflatten(2, (height, width)), x)
        for name in self.after:
            layer = module.get_submodule(name)
            image = _called(layer, image, self.norm_takes_tokens and name != self.after[0])
        return x + image if self.residual else image

    def fused(self) -> tuple[str, ...]:
        return ()

    def called(self) -> tuple[str, ...]:
        return (*self.makes, *self.scales, *self.after)

    def channels(self, module: nn.Module) -> int:
        return features(_first(module.get_submodule(self.makes[0])))[1]

    def options(self) -> str:
        words = [f"relu, {self.head_channels} channels a head", f"{1 + len(self.scales)} scales", f"eps {self.eps:g}"]
        return ", ".join([*words, *(["adds x"] if self.residual else [])])


def _called(layer: nn.Module, image: Tensor, takes_tokens: bool = False) -> Tensor:
    """Of an image, channels first; a linear layer takes them last."""
    if takes_tokens or isinstance(layer, nn.Linear):
        found: Tensor = layer(image.movedim(1, -1)).movedim(-1, 1)
    else:
        found = layer(image)
    return found


def _first(module: nn.Module) -> nn.Module:
    """The first layer in a submodule, or itself."""
    return next(iter(layers_of(nn.ModuleList([module])).values()))


def relu_attention_plans(module: nn.Module, children: dict[str, Plan]) -> Found:
    """See `Search`. Modules of branches are mostly something else, so none is alike."""
    arguments, lists = arguments_of(module), [n for n, c in module.named_children() if isinstance(c, nn.ModuleList)]
    if children or arguments.convention != "image" or len(lists) != 1 or module._parameters:
        return NOTHING
    scales = tuple(joined(lists[0], name) for name, _ in module.get_submodule(lists[0]).named_children())
    own = [n for n, c in module.named_children() if n not in lists and any(True for _ in c.parameters())]
    plans: list[Plan] = []
    for count in (1, 3):
        makes, after = tuple(own[:count]), tuple(own[count:])
        if len(makes) != count or len(after) not in (1, 2) or not all(_makes_heads(module, name) for name in makes):
            continue
        inner = features(_first(module.get_submodule(makes[0])))[0] * count // 3
        eps = {*(v for v in vars(module).values() if type(v) is float and 0 < v < 1e-2)}
        for head, each, tokens, residual in itertools.product(
            head_counts(module, inner), (*sorted(eps), *EPS), (False, True), (False, True)
        ):
            if head > 1 and (len(after) == 2 or not tokens):
                plans.append(ReluAttentionPlan(arguments, makes, scales, after, head, each, tokens, residual))
    return Found(tuple(plans))


def _makes_heads(module: nn.Module, name: str) -> bool:
    """Whether the only layers of a submodule are one pointwise layer and norms."""
    first, *others = layers_of(nn.ModuleList([module.get_submodule(name)])).values()
    return is_pointwise(first) and not any(is_pointwise(layer) for layer in others)
