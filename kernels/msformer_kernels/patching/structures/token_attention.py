"""Linear attention of ReLU features on tokens (SANA, Xie et al., ICLR 2025): one layer each makes query, key and value.

These layers, norms of query and key, and what comes after are called as they are; only the attention between them is
replaced.
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
    joined,
    layers_of,
)
from msformer_kernels.patching.structures.relu_attention import EPS, ReluAttentionPlan


@dataclass(frozen=True)
class TokenAttentionPlan(Plan):
    """``after(efficient_attention(norm(query(x)), norm(key(x)), value(x), normalization="relu"))``"""

    query: str
    key: str
    value: str
    query_norm: str | None
    key_norm: str | None
    after: tuple[str, ...]
    num_heads: int
    eps: float

    title: ClassVar[str] = ReluAttentionPlan.title
    needs_example: ClassVar[str | None] = ReluAttentionPlan.needs_example

    @property
    def dimensions(self) -> int:
        return 3

    def read(self, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """See `Plan`. In float16 the original may clip what overflows, as diffusers does, which float64 cannot show."""
        call = super().read(given, named)
        return None if call is None or call[0][0].dtype == torch.float16 else call

    def run(self, module: nn.Module, x: Tensor, *rest: Any) -> Any:
        query, key, value = (module.get_submodule(name)(x) for name in (self.query, self.key, self.value))
        if self.query_norm is not None:
            query = module.get_submodule(self.query_norm)(query)
        if self.key_norm is not None:
            key = module.get_submodule(self.key_norm)(key)
        heads = (made.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for made in (query, key, value))
        output: Any = efficient_attention(*heads, normalization="relu", eps=self.eps)[0].transpose(1, 2).flatten(2)
        for name in self.after:
            output = module.get_submodule(name)(output)
        return output

    def fused(self) -> tuple[str, ...]:
        return ()

    def called(self) -> tuple[str, ...]:
        norms = (name for name in (self.query_norm, self.key_norm) if name is not None)
        return (self.query, self.key, self.value, *norms, *self.after)

    def channels(self, module: nn.Module) -> int:
        return features(module.get_submodule(self.query))[1]

    def input_shape(self, module: nn.Module, height: int, width: int) -> tuple[int, ...]:
        return (2, height * width, self.channels(module))

    def options(self) -> str:
        words = [f"relu, {self.num_heads} heads", f"eps {self.eps:g}"]
        words += [f"{name} of the {of}" for name, of in ((self.query_norm, "query"), (self.key_norm, "key")) if name]
        return ", ".join(words)


def token_attention_plans(module: nn.Module, children: dict[str, Plan]) -> Found:
    """See `Search`. Query, key and value, and norms of the first two, are taken in the order of definition. Modules
    like these are mostly ordinary attention, so none is alike."""
    arguments = arguments_of(module)
    layers = {name: layer for name, layer in layers_of(module).items() if isinstance(layer, nn.Linear)}
    if children or module._parameters or arguments.convention != "image" or len(layers) != 4:
        return NOTHING
    *makers, end = layers
    made = {features(layers[name]) for name in makers}
    last = end.split(".")[0]
    if len({*makers, last}) != 4 or any("." in name for name in makers) or len(made) != 1:
        return NOTHING
    (query, key, value), inner = makers, made.pop()[0]
    if features(layers[end])[1] != inner:
        return NOTHING
    output = module.get_submodule(last)
    entries = [joined(last, n) for n, _ in output.named_children()]
    after = entries if isinstance(output, nn.ModuleList) else [last]
    rest = (n for n, child in module.named_children() if not isinstance(child, nn.Dropout))
    others = [n for n in rest if n not in (*makers, last)]
    plans = (
        TokenAttentionPlan(arguments, query, key, value, *norms, tuple(after), heads, eps)
        for norms, heads, eps in itertools.product(_norms(others), head_counts(module, inner), EPS)
    )
    return Found(tuple(plans))


def _norms(others: list[str]) -> list[tuple[str | None, str | None]]:
    """What may come after query and key, of the other submodules."""
    found: list[tuple[str | None, str | None]] = [(None, None)]
    if len(others) == 1:
        found = [(others[0], None), (None, others[0]), *found]
    elif len(others) == 2:
        found = [(others[0], others[1]), *found]
    return found
