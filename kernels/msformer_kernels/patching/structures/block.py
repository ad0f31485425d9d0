"""A pre-norm transformer block whose feed-forward layer is MixFFN: its LayerNorm and residual are fused in.

The block's attention is called as it is, whatever it computes; where it is efficient attention, its LayerNorm and
residual are fused in as well.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from msformer_kernels.patching.structures.attention import AttentionPlan
from msformer_kernels.patching.structures.common import (
    NOTHING,
    Found,
    Plan,
    arguments_of,
    as_image,
    as_tokens,
    is_norm,
    joined,
    may_drop,
)
from msformer_kernels.patching.structures.mix_ffn import IDENTITY, MixFFNPlan

CALLS = ("hw", "size", "image", "tokens")
"""How a block calls its attention: tokens and height, width; tokens and (height, width); an image; tokens alone."""
KEYWORDS = ("output_attentions", "output_hidden_states")
"""transformers hands these on from the model to the attention, which may look at them."""


@dataclass(frozen=True)
class BlockPlan(Plan):
    """``y = x + attention(norm1(x))``, then ``y + feed_forward(norm2(y))``"""

    norm1: str
    attention: str
    attention_call: str
    attention_adds: bool
    """Whether the attention takes what it adds to its output as an argument, `identity` (OpenMMLab)."""
    returns_rest: bool
    """Whether the block returns a tuple: its output, and what the attention returns besides its own."""
    norm2: str
    feed_forward: str
    inner: MixFFNPlan
    inner_attention: AttentionPlan | None
    hands_on: bool
    """Whether `KEYWORDS` go to the attention."""
    dropped_by: tuple[str, str] | None = None
    """Submodules, stochastic depth, that are called on what attention and feed-forward layer give, before the sum."""

    title: ClassVar[str] = "block with mix_ffn"

    @property
    def probe_sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (8, 16), (16, 8)

    def keywords(self) -> tuple[str, ...]:
        return KEYWORDS if self.hands_on else ()

    def run(self, module: nn.Module, x: Tensor, *rest: Any, **keywords: Any) -> Any:
        convention = self.arguments.convention
        assert convention is not None
        tokens, height, width = as_tokens(convention, x, rest)
        attended, returned = self._attend(module, tokens, height, width, keywords)
        norm = module.get_submodule(self.norm2)
        feed_forward = module.get_submodule(self.feed_forward)
        drops = self.dropped_by
        output = self.inner.compute(feed_forward, attended, height, width, norm=norm, residual=drops is None)
        if drops is not None:
            output = attended + module.get_submodule(drops[1])(output)
        output = self.as_given(output, height, width, x)
        return (output, *returned) if self.returns_rest else output

    def _attend(
        self, module: nn.Module, x: Tensor, height: int, width: int, keywords: dict[str, Any]
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """x + attention(norm1(x)), and what the attention returns besides."""
        norm, attention = module.get_submodule(self.norm1), module.get_submodule(self.attention)
        drop = None if self.dropped_by is None else module.get_submodule(self.dropped_by[0])
        if self.inner_attention is not None:
            found = self.inner_attention.compute(attention, x, norm=norm, residual=drop is None)
            return (found if drop is None else x + drop(found)), ()
        tokens = norm(x)
        if self.attention_call == "image":
            found = attention(as_image(tokens, height, width), **keywords)
        else:
            size = {"hw": (height, width), "size": ((height, width),), "tokens": ()}[self.attention_call]
            found = attention(tokens, *size, **({IDENTITY: x} if self.attention_adds else {}), **keywords)
        found, returned = (found[0], found[1:]) if isinstance(found, tuple) else (found, ())
        if self.attention_call == "image":
            found = as_tokens("image", found, ())[0]
        if drop is not None:
            found = drop(found)
        return (found if self.attention_adds else x + found), returned

    def fused(self) -> tuple[str, ...]:
        names = [self.norm2, *(joined(self.feed_forward, name) for name in self.inner.fused())]
        if self.inner_attention is not None:
            names += [self.norm1, *(joined(self.attention, name) for name in self.inner_attention.fused())]
        return tuple(names)

    def evaluated(self) -> tuple[str, ...]:
        return tuple(joined(self.feed_forward, name) for name in self.inner.evaluated())

    def called(self) -> tuple[str, ...]:
        called = (self.norm1, self.attention) if self.inner_attention is None else ()
        return (*called, *(self.dropped_by or ()))

    def for_training(self, module: nn.Module) -> tuple[Plan, ...]:
        """The attention of OpenMMLab, which adds by itself, drops by itself."""
        inside = tuple(f"{name}." for name in (self.attention, self.feed_forward))
        names = [name for name in may_drop(module) if not name.startswith(inside)]
        pairs = ((a, b) for i, a in enumerate(names) for b in names[i:])
        return () if self.attention_adds else tuple(replace(self, dropped_by=pair) for pair in pairs)

    def channels(self, module: nn.Module) -> int:
        return self.inner.channels(module.get_submodule(self.feed_forward))

    def options(self) -> str:
        both = " and residual" * (self.dropped_by is None)
        words = [f"{self.norm2}{both} in {self.feed_forward}"]
        words += [f"{self.norm1}{both} in {self.attention}"] * (self.inner_attention is not None)
        words += [f"{name} called" for name in dict.fromkeys(self.dropped_by or ())]
        return ", ".join(words)


def block_plans(module: nn.Module, children: dict[str, Plan]) -> Found:
    """See `Search`. No block is alike: its feed-forward layer is replaced all the same."""
    arguments = arguments_of(module)
    own = {name: child for name, child in module.named_children() if any(True for _ in child.parameters())}
    inner = {name: plan for name, plan in children.items() if isinstance(plan, MixFFNPlan) and name in own}
    if len(inner) != 1 or len(own) != 4 or module._parameters or arguments.convention is None:
        return NOTHING
    feed_forward, plan = next(iter(inner.items()))
    channels = plan.channels(own[feed_forward])
    norms = [name for name, child in own.items() if is_norm(child, channels)]
    others = [name for name in own if name not in (*norms, feed_forward)]
    if len(norms) != 2 or len(others) != 1 or plan.norm is not None or plan.adds == "x":
        return NOTHING
    adds = plan.adds == IDENTITY
    found = children.get(others[0])
    plans: list[Plan] = []
    for attention in (found, None) if isinstance(found, AttentionPlan) else (None,):
        hands_on = (True, False) if arguments.any_keyword and attention is None else (False,)
        for handed, (norm1, norm2), call, rest in itertools.product(
            hands_on, itertools.permutations(norms), CALLS, (False, True)
        ):
            names = (norm1, others[0], call, adds, rest, norm2, feed_forward)
            plans.append(BlockPlan(arguments, *names, plan, attention, handed))
    return Found(tuple(plans))
