"""Efficient attention with its projections (Shen et al., WACV 2021): four pointwise layers, on an image."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from msformer_kernels.ops.efficient_self_attention import efficient_self_attention
from msformer_kernels.patching.structures.common import (
    NOTHING,
    Found,
    Plan,
    arguments_of,
    as_tokens,
    features,
    head_counts,
    is_pointwise,
    layers_of,
    weight_and_bias,
)


@dataclass(frozen=True)
class AttentionPlan(Plan):
    """``output(efficient_attention(query(x), key(x), value(x)))``"""

    query: str
    key: str
    value: str
    output: str
    num_heads: int

    title: ClassVar[str] = "efficient_self_attention"

    def run(self, module: nn.Module, x: Tensor, *rest: Any) -> Tensor:
        convention = self.arguments.convention
        assert convention is not None
        tokens, height, width = as_tokens(convention, x, rest)
        return self.as_given(self.compute(module, tokens), height, width, x)

    def compute(self, module: nn.Module, tokens: Tensor, *, norm: Any = None, residual: bool = False) -> Tensor:
        """Of tokens ``[B, N, C]``, with a LayerNorm before and x added."""
        layers = (self.query, self.key, self.value, self.output)
        parameters = [p for name in layers for p in weight_and_bias(module, name)]
        return efficient_self_attention(
            tokens,
            *parameters,  # type: ignore[arg-type]
            num_heads=self.num_heads,
            norm_weight=None if norm is None else norm.weight,
            norm_bias=None if norm is None else norm.bias,
            norm_eps=1e-5 if norm is None else norm.eps,
            residual=residual,
        )[0]

    def fused(self) -> tuple[str, ...]:
        return (self.query, self.key, self.value, self.output)

    def channels(self, module: nn.Module) -> int:
        return features(module.get_submodule(self.query))[1]

    def options(self) -> str:
        return f"{self.num_heads} heads"


def attention_plans(module: nn.Module, children: dict[str, Plan]) -> Found:
    """See `Search`. Most modules of four pointwise layers are other attentions, so none is alike."""
    layers, arguments = layers_of(module), arguments_of(module)
    if children or len(layers) != 4 or not all(is_pointwise(layer) for layer in layers.values()):
        return NOTHING
    if module._parameters or arguments.convention != "image":
        return NOTHING
    plans: list[Plan] = []
    for query, key, value, output in itertools.permutations(layers):
        (queries, into), (keys, _), (values, _) = (features(layers[n]) for n in (query, key, value))
        if queries != keys or features(layers[output]) != (into, values):
            continue
        if any(features(layers[n])[1] != into for n in (key, value)):
            continue
        for heads in head_counts(module, keys, values):
            plans.append(AttentionPlan(arguments, query, key, value, output, heads))
    return Found(tuple(plans))
