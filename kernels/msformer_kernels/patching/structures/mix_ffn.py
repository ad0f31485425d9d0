"""MixFFN: two pointwise layers around a depthwise convolution, with or without a gate, a norm, a skip, a residual."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from msformer_kernels.nn.activations import known_name
from msformer_kernels.ops.mix_ffn import mix_ffn
from msformer_kernels.ops.mix_ffn.reference import ACTIVATIONS, KERNEL_SIZES
from msformer_kernels.patching.structures.common import (
    NOTHING,
    Found,
    Plan,
    arguments_of,
    as_tokens,
    features,
    is_depthwise,
    is_norm,
    is_pointwise,
    layers_of,
    may_drop,
)

IDENTITY = "identity"
"""The name of the optional argument that is added to the output in place of x (OpenMMLab)."""
MOST_LAYERS = 8
SAME = "same"
INNER = ("identity", "relu", SAME)
"""What is tried as the activation before the convolution; `SAME`: that after it."""


@dataclass(frozen=True)
class MixFFNPlan(Plan):
    """``fc2(act([hidden norm](dw(u) [+ u])))``, ``u = [inner act](fc1([norm](x)))``, and what is added to it; or
    with a gate, ``fc2(z_1 * act(z_2))``, of the halves of ``z = dw(u) [+ u]``."""

    fc1: str
    convolution: str
    fc2: str
    activation: str
    inner_activation: str
    skip: bool = False
    hidden_norm: str | None = None
    norm: str | None = None
    adds: str | None = None
    """``"x"``, or ``"identity"``: the argument of that name, or x without one."""
    gated: bool = False
    dropped_by: str | None = None
    """A submodule that is called on the output before anything is added to it: stochastic depth."""

    title: ClassVar[str] = "mix_ffn"

    def run(self, module: nn.Module, x: Tensor, *rest: Any) -> Tensor:
        convention = self.arguments.convention
        assert convention is not None
        tokens, height, width = as_tokens(convention, x, rest)
        identity = rest[self._identity_at()] if self.adds == IDENTITY else None
        norm = None if self.norm is None else module.get_submodule(self.norm)
        fused_sum = self.adds is not None and identity is None and self.dropped_by is None
        output = self.compute(module, tokens, height, width, norm=norm, residual=fused_sum)
        output = self.as_given(output, height, width, x)
        if self.dropped_by is not None:
            output = module.get_submodule(self.dropped_by)(output)
        if fused_sum or self.adds is None:
            return output
        return (x if identity is None else identity) + output

    def taken(self) -> tuple[str, ...]:
        return (IDENTITY,) if self.adds == IDENTITY else ()

    def _identity_at(self) -> int:
        names = [*self.arguments.required[1:], *(name for name, _ in self.arguments.optional)]
        return names.index(IDENTITY)

    def compute(
        self, module: nn.Module, tokens: Tensor, height: int, width: int, *, norm: Any = None, residual: bool = False
    ) -> Tensor:
        """Of tokens ``[B, N, C]``, with a LayerNorm before and x added."""
        fc1_weight, fc1_bias = self.weight_and_bias(module, self.fc1)
        dw_weight, dw_bias = self.weight_and_bias(module, self.convolution)
        fc2_weight, fc2_bias = self.weight_and_bias(module, self.fc2)
        hidden_norm: Any = None if self.hidden_norm is None else module.get_submodule(self.hidden_norm)
        some_norm = norm if hidden_norm is None else hidden_norm  # one eps for both; the proof fails where they differ
        return mix_ffn(
            tokens,
            height,
            width,
            fc1_weight.flatten(1),
            fc1_bias,
            dw_weight,
            dw_bias,
            fc2_weight.flatten(1),
            fc2_bias,
            skip=self.skip,
            hidden_norm_weight=None if hidden_norm is None else hidden_norm.weight,
            hidden_norm_bias=None if hidden_norm is None else hidden_norm.bias,
            norm_weight=None if norm is None else norm.weight,
            norm_bias=None if norm is None else norm.bias,
            norm_eps=1e-5 if some_norm is None else some_norm.eps,
            activation=self.activation,
            inner_activation=self.inner_activation,
            residual=residual,
            gated=self.gated,
        )

    def weight_and_bias(self, module: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
        """Of the layer of this name, as the operator takes them."""
        layer: Any = module.get_submodule(name)
        return layer.weight, layer.bias

    def fused(self) -> tuple[str, ...]:
        norms = (name for name in (self.hidden_norm, self.norm) if name is not None)
        return (self.fc1, self.convolution, self.fc2, *norms)

    def called(self) -> tuple[str, ...]:
        return () if self.dropped_by is None else (self.dropped_by,)

    def for_training(self, module: nn.Module) -> tuple[Plan, ...]:
        return tuple(replace(self, dropped_by=name) for name in may_drop(module))

    def channels(self, module: nn.Module) -> int:
        return features(module.get_submodule(self.fc1))[1]

    def options(self) -> str:
        words = [self.activation]
        words += [f"{self.inner_activation} before the convolution"] * (self.inner_activation != "identity")
        words += ["gated"] * self.gated
        words += ["skip"] * self.skip
        words += [f"hidden norm {self.hidden_norm}"] * (self.hidden_norm is not None)
        words += [f"norm {self.norm}"] * (self.norm is not None)
        words += [f"{self.dropped_by} called"] * (self.dropped_by is not None)
        words += [f"adds {self.adds}"] * (self.adds is not None)
        return ", ".join(words)


def mix_ffn_plans(module: nn.Module, children: dict[str, Plan]) -> Found:
    """See `Search`. Alike is a module with one depthwise convolution among a few layers, without a BatchNorm."""
    layers = layers_of(module)
    if any(isinstance(layer, _BatchNorm) for layer in layers.values()):
        return NOTHING
    return plans_of(module, layers, children)


def plans_of(module: nn.Module, layers: dict[str, nn.Module], children: dict[str, Plan]) -> Found:
    """What `mix_ffn_plans` finds in a module that has these layers."""
    depthwise = [name for name, layer in layers.items() if is_depthwise(layer)]
    pointwise = [name for name, layer in layers.items() if is_pointwise(layer)]
    norms = [name for name, layer in layers.items() if isinstance(layer, nn.LayerNorm)]
    if len(depthwise) != 1 or len(pointwise) < 2 or len(layers) > MOST_LAYERS or children:
        return NOTHING
    why = _why_not(module, layers, depthwise[0], pointwise, norms)
    if why is not None:
        return Found(why_not=why, alike=True)
    arguments = arguments_of(module)
    convolution: Any = layers[depthwise[0]]
    hidden = convolution.in_channels
    plans: list[Plan] = []
    adds = [None, *([IDENTITY] if IDENTITY in dict(arguments.optional) else []), "x"]
    for fc1, fc2 in _orders(layers, pointwise, hidden):
        gated = features(layers[fc2])[1] != hidden
        outer = [None, *(n for n in norms if is_norm(layers[n], features(layers[fc1])[1]))]
        inner = [None] if gated else [None, *(n for n in norms if is_norm(layers[n], hidden))]
        for before, activation, norm, hidden_norm, added, skip in itertools.product(
            *_likely_first(module), outer, inner, adds, (False, True)
        ):
            if norm and norm == hidden_norm:
                continue
            names = (fc1, depthwise[0], fc2, activation, activation if before == SAME else before)
            plans.append(MixFFNPlan(arguments, *names, skip, hidden_norm, norm, added, gated))
    return Found(tuple(plans), alike=True)


def _orders(layers: dict[str, nn.Module], pointwise: list[str], hidden: int) -> list[tuple[str, str]]:
    """The first and the second layer of a MixFFN with these hidden channels: its second takes all of them or, with a
    gate, half."""
    return [
        (fc1, fc2)
        for fc1, fc2 in itertools.permutations(pointwise, 2)
        if features(layers[fc1])[0] == hidden
        and features(layers[fc2])[1] in (hidden, hidden / 2)
        and features(layers[fc2])[0] == features(layers[fc1])[1]
    ]


def _likely_first(module: nn.Module) -> tuple[list[str], list[str]]:
    """What is tried before the convolution and after it: first what the activations among the submodules suggest."""
    names = [known_name(child) for child in module.modules()]
    same_before = any(names.count(name) > 1 for name in ACTIVATIONS if name != "identity")
    before = sorted(INNER, key=lambda name: (name == SAME) != same_before)
    return before, sorted(ACTIVATIONS, key=lambda name: name not in names or name == "identity")


def _why_not(
    module: nn.Module, layers: dict[str, nn.Module], depthwise: str, pointwise: list[str], norms: list[str]
) -> str | None:
    """Why a module that looks like MixFFN cannot be it; None if it may be."""
    convolution: Any = layers[depthwise]
    others = [n for n in layers if n not in (depthwise, *pointwise, *norms)]
    if any(p is not None for p in module._parameters.values()):
        return "it has parameters of its own"
    if others:
        return f"MixFFN has no {type(layers[others[0]]).__name__} ({others[0]})"
    if len(pointwise) != 2:
        return f"MixFFN has 2 pointwise layers, this has {len(pointwise)} ({', '.join(pointwise)})"
    if not _keeps_the_size(convolution):
        sizes = ", ".join(f"{k}x{k}" for k in KERNEL_SIZES)
        return (
            f"its depthwise convolution is {convolution.kernel_size}, stride {convolution.stride}, padding "
            f"{convolution.padding}, dilation {convolution.dilation}, {convolution.padding_mode}; only {sizes} with "
            "stride 1 and as many zeros around as keep the size are fused"
        )
    shapes = [features(layers[n]) for n in pointwise]
    hidden = convolution.in_channels
    if not _orders(layers, pointwise, hidden):
        around = f"layers {shapes} (out, in) around {hidden} channels"
        (widest, into), (out, _) = shapes
        if widest > hidden and into == out:
            return (
                f"its convolution mixes {hidden} of the {widest} channels that its first layer gives, as in MambaOut; "
                "only a convolution of all of them is fused"
            )
        if any(out == hidden and into in (hidden, hidden / 2) for (out, _), (_, into) in (shapes, shapes[::-1])):
            return f"its output features differ from its input features: {around}"
        return f"it is split: {around}"
    if arguments_of(module).convention is None:
        return f"its forward takes {len(arguments_of(module).required)} arguments, expected (x, height, width), " + (
            "(x, (height, width)) or an image"
        )
    return None


def _keeps_the_size(convolution: Any) -> bool:
    """Whether a depthwise convolution is one of the operator's."""
    size = convolution.kernel_size[0]
    padding = (size // 2, size // 2) if convolution.padding == "same" else convolution.padding
    found = (convolution.kernel_size, convolution.stride, padding, convolution.dilation, convolution.padding_mode)
    return size in KERNEL_SIZES and found == ((size, size), (1, 1), (size // 2, size // 2), (1, 1), "zeros")
