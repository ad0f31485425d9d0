"""Linear attention of diffusion models, on an image or on each image of a video: query, key and value of all heads come
from one layer or from one each, channels first.

On a CPU norm and layers around the attention are fused with it, where nothing is between them. Elsewhere, on a GPU,
and in small images, they are called as they are, and only what is between them is replaced.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from msformer_kernels.core.precision import arithmetic_dtype, autocast_enabled
from msformer_kernels.ops.efficient_attention import efficient_attention
from msformer_kernels.ops.efficient_self_attention import efficient_self_attention
from msformer_kernels.patching.structures.common import (
    NOTHING,
    Found,
    Plan,
    arguments_of,
    as_image,
    features,
    head_counts,
    is_pointwise,
    layers_of,
    weight_and_bias,
)

LEAST_LENGTH = 1e-12
"""By which `torch.nn.functional.normalize` divides at least."""


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

    @property
    def dimensions(self) -> int:
        return 5 if self.video else 4

    def run(self, module: nn.Module, x: Tensor, *rest: Any) -> Any:
        if not self.video:
            return self._of_images(module, x)
        frames = x.shape[2]
        images = self._of_images(module, x.transpose(1, 2).flatten(0, 1))
        return images.unflatten(0, (-1, frames)).transpose(1, 2)

    def _of_images(self, module: nn.Module, x: Tensor) -> Tensor:
        for name in self.before:
            x = module.get_submodule(name)(x)
        image = self._attended(module, x)
        for name in self.after:
            image = module.get_submodule(name)(image)
        return image

    def _memory(self, module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
        """Keys and values of the memory tokens, ``[heads, M, D]``."""
        if self.memory is None:
            return None, None
        key, value = getattr(module, self.memory).transpose(2, 3).unbind()
        return key, value

    def _attended(self, module: nn.Module, x: Tensor) -> Any:
        """Of the attention, of an image that has gone through `before`."""
        height, width = x.shape[2:]
        made = [module.get_submodule(name)(x) for name in self.makers]
        parts = made[0].unflatten(1, (3, -1)).unbind(1) if len(made) == 1 else made
        heads = (part.flatten(2).unflatten(1, (self.num_heads, -1)) for part in parts)  # [B, h, D, N]
        query, key, value = (part.transpose(2, 3) for part in heads)
        memory = self._memory(module)
        output, _ = efficient_attention(
            query, key, value, memory_key=memory[0], memory_value=memory[1], output_scale=self.scale
        )
        return self.laid(output.transpose(2, 3).flatten(1, 2).unflatten(2, (height, width)), x)

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


@dataclass(frozen=True)
class LinearAttentionWithLayersPlan(LinearAttentionPlan):
    """The same with the layers that make query, key and value, the one behind the attention, and the norms before and
    behind all of these.

    They are fused in images with more tokens than channels: there the folded form takes fewer multiplications than the
    layers do one by one. In smaller images it measures slower than they do. The norms are never called: see `_normed`.
    """

    output: str = ""
    """The layer behind the attention."""
    image_channels: int = 0
    rest: tuple[str, ...] = ()
    """What comes after it, and is called."""
    norm: str = ""
    """The parameter of the norm over channels that `before` consists of."""
    last_norm: str = ""
    """That of the norm behind the last layer, before `rest`."""
    norm_kind: str = "layer"
    norm_eps: float = 0.0

    title: ClassVar[str] = "efficient_self_attention"

    @property
    def probe_sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """One image in which the layers are not fused, and one in which they are."""
        side = math.isqrt(self.image_channels) + 1
        return (1, 3), (side, side + 1)

    def _of_images(self, module: nn.Module, x: Tensor) -> Tensor:
        if not self.norm:
            for name in self.before:
                x = module.get_submodule(name)(x)
        if x.device.type == "cpu" and x.shape[1] < x.shape[2:].numel():
            image = self._attended_with_layers(module, x)
        else:
            x = self._normed(module, self.norm, x) if self.norm else x
            image = module.get_submodule(self.output)(self._attended(module, x))
        if self.last_norm:
            image = self._normed(module, self.last_norm, image)
        for name in self.rest:
            image = module.get_submodule(name)(image)
        return image

    def _normed(self, module: nn.Module, weight: str, image: Tensor) -> Any:
        """Of an image, over its channels. On a CPU PyTorch's norm of a dimension that is not the last takes 20 times as
        long as the sum of squares."""
        wide = image.to(arithmetic_dtype(image.dtype))
        if self.norm_kind == "layer":
            wide = wide - wide.mean(1, keepdim=True)
        scale = (wide.square().mean(1, keepdim=True) + self.norm_eps).rsqrt()
        found = wide * (scale * module.get_parameter(weight).view(-1, 1, 1))  # a pass less on the way back
        return found if autocast_enabled(image.device.type) else found.to(image.dtype)

    def _attended_with_layers(self, module: nn.Module, x: Tensor) -> Any:
        parts = [weight_and_bias(module, name) for name in self.makers]
        if len(parts) == 1:
            weight, bias = parts[0]
            biases = (None, None, None) if bias is None else bias.chunk(3)
            parts = list(zip(weight.chunk(3), biases, strict=True))
        (query, query_bias), (key, key_bias), (value, value_bias) = parts
        memory_key, memory_value = self._memory(module)
        if memory_key is not None and key_bias is not None:  # the softmax sees differences alone
            memory_key, key_bias = memory_key - key_bias.unflatten(0, (self.num_heads, 1, -1)), None
        output, output_bias = weight_and_bias(module, self.output)
        tokens, _ = efficient_self_attention(
            x.flatten(2).transpose(1, 2),
            query,
            query_bias,
            key,
            key_bias,
            value,
            value_bias,
            output * self.scale,
            output_bias,
            num_heads=self.num_heads,
            norm_weight=module.get_parameter(self.norm).flatten() if self.norm else None,
            norm_kind=self.norm_kind,
            norm_eps=self.norm_eps,
            memory_key=memory_key,
            memory_value=memory_value,
        )
        return self.laid(as_image(tokens, *x.shape[2:]), x)

    def fused(self) -> tuple[str, ...]:
        return (*self.makers, self.output)

    def called(self) -> tuple[str, ...]:
        return self.rest if self.norm else (*self.before, *self.rest)

    def options(self) -> str:
        norms = [f"{self.norm_kind} norm {name}" for name in (self.norm, self.last_norm) if name]
        return ", ".join((super().options(), *norms))


def _with_layers(module: nn.Module, plan: LinearAttentionPlan) -> Iterator[LinearAttentionWithLayersPlan]:
    """Plans that fuse layers, those with the most of them first; none where something is between."""
    if len(plan.after) != 1 or not all(is_pointwise(module.get_submodule(name)) for name in plan.makers):
        return
    output, rest = plan.after[0], tuple[str, ...]()
    after = module.get_submodule(output)
    if type(after) is nn.Sequential and len(after) > 0:
        first, *others = (f"{output}.{name}" for name, _ in after.named_children())
        output, rest, after = first, tuple(others), after[0]
    if not is_pointwise(after):
        return
    out, into = features(after)[0], features(module.get_submodule(plan.makers[0]))[1]
    whole = LinearAttentionWithLayersPlan(**vars(plan), output=output, image_channels=into, rest=rest)
    before = _norm(module, plan.before[0], into) if len(plan.before) == 1 else None
    behind = _norm(module, rest[0], out) if rest else None
    for norms in dict.fromkeys(((before, behind), (before, None), (None, behind))):
        each_eps = {norm.eps for norm in norms if norm is not None}
        if len(each_eps) != 1:
            continue
        (eps,) = each_eps
        norm, last_norm = ("" if norm is None else norm.weight for norm in norms)
        for kind in ("rms", "layer"):
            fused = replace(whole, norm=norm, last_norm=last_norm, norm_kind=kind, norm_eps=eps)
            yield replace(fused, rest=rest[1:]) if last_norm else fused
    yield whole


class _Norm(NamedTuple):
    weight: str
    eps: float


def _norm(module: nn.Module, name: str, channels: int) -> _Norm | None:
    """What a submodule has if it is a norm over so many channels, with one parameter."""
    submodule = module.get_submodule(name)
    inner = list(submodule.named_parameters(name))
    if is_pointwise(submodule) or len(inner) != 1 or inner[0][1].numel() != channels:
        return None
    given = getattr(submodule, "eps", None)
    return _Norm(inner[0][0], given if isinstance(given, float) else LEAST_LENGTH**2 / channels)


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
    plans = [
        LinearAttentionPlan(arguments, start, order, end, heads, memory, (inner // heads) ** power, video)
        for start, order, end, heads, power, video in ways
    ]
    with_layers = (more for plan in plans for more in _with_layers(module, plan))
    return Found((*with_layers, *plans))
