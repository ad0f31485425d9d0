"""Linear attention of diffusion models, on an image or on each image of a video: query, key and value of all heads come
from one layer or from one each, channels first.

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
    """``after(scale * efficient_attention(q, [memory, k], [memory, v]))``, with q, k and v of ``before(x)``"""

    before: tuple[str, ...]
    makers: tuple[str, ...]
    """What makes query, key and value: one module, or three."""
    after: tuple[str, ...]
    num_heads: int
    memory: str | None
    scale: float
    video: bool
    """Whether x is `[B, C, frames, H, W]`."""

    title: ClassVar[str] = "efficient_attention"
    needs_example: ClassVar[str | None] = (
        "attention on [B, heads, D, N] does not gain at every size; give `example` to measure it"
    )

    def run(self, module: nn.Module, x: Tensor, *rest: Any) -> Any:
        if not self.video:
            return self._of_images(module, x)
        frames = x.shape[2]
        images = self._of_images(module, x.transpose(1, 2).flatten(0, 1))
        return images.unflatten(0, (-1, frames)).transpose(1, 2)

    def _of_images(self, module: nn.Module, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        for name in self.before:
            x = module.get_submodule(name)(x)
        made = [module.get_submodule(name)(x) for name in self.makers]
        parts = made[0].unflatten(1, (3, -1)).unbind(1) if len(made) == 1 else made
        heads = (part.flatten(2).unflatten(1, (self.num_heads, -1)) for part in parts)  # [B, h, D, N]
        query, key, value = (part.transpose(2, 3) for part in heads)
        memory = (None, None) if self.memory is None else getattr(module, self.memory).transpose(2, 3).unbind()
        output, _ = efficient_attention(
            query, key, value, memory_key=memory[0], memory_value=memory[1], output_scale=self.scale
        )
        image: Any = output.transpose(2, 3).flatten(1, 2).unflatten(2, (height, width))
        for name in self.after:
            image = module.get_submodule(name)(image)
        return image

    def fused(self) -> tuple[str, ...]:
        return ()

    def called(self) -> tuple[str, ...]:
        return (*self.before, *self.makers, *self.after)

    def channels(self, module: nn.Module) -> int:
        maker = nn.ModuleList([module.get_submodule(self.makers[0])])
        return next(features(layer)[1] for layer in layers_of(maker).values() if is_pointwise(layer))

    def input_shape(self, module: nn.Module, height: int, width: int) -> tuple[int, ...]:
        frames = (3,) if self.video else ()
        return (2, self.channels(module), *frames, height, width)

    def options(self) -> str:
        words = [f"{self.num_heads} heads", f"scale {self.scale:.4g}"]
        words += [f"memory {self.memory}"] * (self.memory is not None)
        words += ["each frame"] * self.video
        return ", ".join(words)


def linear_attention_plans(module: nn.Module, children: dict[str, Plan]) -> Found:
    """See `Search`. Modules like these are mostly other attentions, so none is alike. One layer more may make keys and
    values of a text (imagen-pytorch); a call without the text does not use it."""
    arguments, own = arguments_of(module), [n for n, p in module._parameters.items() if p is not None]
    points = {name: layer for name, layer in layers_of(module).items() if is_pointwise(layer)}
    if children or arguments.convention != "image" or len(points) not in (2, 4, 5) or len(own) > 1:
        return NOTHING
    widths = {name.split(".")[0]: features(layer)[0] for name, layer in points.items()}
    *makers, last = widths
    inner = features(list(points.values())[-1])[1]
    of_a_text = [name for name in makers if widths[name] == 2 * inner] if len(points) == 5 else []
    makers = [name for name in makers if name not in of_a_text]
    wanted = 3 * inner if len(makers) == 1 else inner
    if len(widths) < len(points) or len(makers) not in (1, 3) or any(widths[name] != wanted for name in makers):
        return NOTHING
    with_parameters = [
        n for n, child in module.named_children() if n not in of_a_text and any(True for _ in child.parameters())
    ]
    before = tuple(n for n in with_parameters if n not in (*makers, last))
    between = [n for n, _ in module.named_children() if n not in (*with_parameters, *of_a_text)]
    memory = own[0] if own else None
    orders = itertools.permutations(makers)
    ends = [(last,), *((name, last) for name in between)]
    starts = dict.fromkeys((before, ()))
    ways = itertools.product(starts, orders, ends, head_counts(module, inner), (0.0, -0.5), (False, True))
    plans = (
        LinearAttentionPlan(arguments, start, order, end, heads, memory, (inner // heads) ** power, video)
        for start, order, end, heads, power, video in ways
    )
    return Found(tuple(plans))
