"""Linear attention of diffusion models, on an image: one layer makes query, key and value of all heads, channels first.

The modules around the attention are called as they are; only what is between them is replaced.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

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
    layers_of,
)


@dataclass(frozen=True)
class LinearAttentionPlan(Plan):
    """``after(scale * efficient_attention(q, [memory, k], [memory, v]))``, ``q, k, v = qkv(before(x))``"""

    before: tuple[str, ...]
    qkv: str
    after: str
    num_heads: int
    memory: str | None
    scale: float

    title: ClassVar[str] = "efficient_attention"
    needs_example: ClassVar[str | None] = (
        "attention on [B, heads, D, N] does not gain at every size; give `example` to measure it"
    )

    def run(self, module: nn.Module, x: Tensor, *rest: Any) -> Any:
        height, width = x.shape[2:]
        for name in self.before:
            x = module.get_submodule(name)(x)
        made = module.get_submodule(self.qkv)(x).unflatten(1, (3, self.num_heads, -1)).flatten(4)  # [B, 3, h, D, N]
        query, key, value = (part.transpose(2, 3) for part in made.unbind(1))  # gradients are put together as they lie
        memory = (None, None) if self.memory is None else getattr(module, self.memory).transpose(2, 3).unbind()
        output, _ = efficient_attention(
            query, key, value, memory_key=memory[0], memory_value=memory[1], output_scale=self.scale
        )
        image = output.transpose(2, 3).flatten(1, 2).unflatten(2, (height, width))
        return module.get_submodule(self.after)(image)

    def fused(self) -> tuple[str, ...]:
        return ()

    def called(self) -> tuple[str, ...]:
        return (*self.before, self.qkv, self.after)

    def channels(self, module: nn.Module) -> int:
        return features(module.get_submodule(self.qkv))[1]

    def options(self) -> str:
        memory = [] if self.memory is None else [f"memory {self.memory}"]
        return ", ".join([f"{self.num_heads} heads", f"scale {self.scale:.4g}", *memory])


def linear_attention_plans(module: nn.Module, children: dict[str, Plan]) -> Found:
    """See `Search`. Modules like these are mostly other attentions, so none is alike."""
    arguments, own = arguments_of(module), [n for n, p in module._parameters.items() if p is not None]
    points = {name: layer for name, layer in layers_of(module).items() if is_pointwise(layer)}
    if children or arguments.convention != "image" or len(points) != 2 or len(own) > 1:
        return NOTHING
    (qkv, makes), (last, takes) = points.items()
    after, inner = last.split(".")[0], features(takes)[1]
    if features(makes)[0] != 3 * inner or "." in qkv:
        return NOTHING
    with_parameters = [n for n, child in module.named_children() if any(True for _ in child.parameters())]
    before = tuple(n for n in with_parameters if n not in (qkv, after))
    plans: list[Plan] = []
    for heads, order in itertools.product(head_counts(module, inner), {before, ()}):
        for scale in (1.0, (inner // heads) ** -0.5):
            plans.append(LinearAttentionPlan(arguments, order, qkv, after, heads, own[0] if own else None, scale))
    return Found(tuple(plans))
