"""How the structure of a module is read: its layers, its calling convention, and what a plan is.

A *plan* says what a module's forward may compute, in terms of the operators and of the module's own layers, by name. It
is frozen and holds names and options alone, so it can be pickled and compared; `proof` decides whether it is true.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from msformer_kernels.nn.activations import known_name

LAYERS = (nn.Linear, nn.Conv2d, nn.LayerNorm, _BatchNorm)
SCALARS = (bool, int, float, str, type(None))
LIKE, CHANNELS_FIRST, CHANNELS_LAST = "like x", "channels first", "channels last"
"""How an image lies in memory: as x does, which is channels first or last, or always in the same way."""


@dataclass(frozen=True)
class Arguments:
    """Of a forward: the names of those that a call must give, the others with their defaults, and whether it takes any
    keyword."""

    required: tuple[str, ...]
    optional: tuple[tuple[str, Any], ...]
    any_keyword: bool = False

    @property
    def convention(self) -> str | None:
        """``"image"``: `[B, C, H, W]`; ``"size"``: tokens `[B, N, C]` and (height, width); ``"hw"``: tokens, height,
        width. None for any other number of arguments."""
        return {1: "image", 2: "size", 3: "hw"}.get(len(self.required))

    def read(self, given: tuple[Any, ...], named: dict[str, Any], taken: tuple[str, ...]) -> tuple[Any, ...] | None:
        """The required arguments of a call, then the optional ones; None where it gives too few, unknown ones, or
        another value than the default for an optional one that is not `taken`."""
        if not named and len(given) == len(self.required):
            return (*given, *(default for _, default in self.optional))
        names = (*self.required, *(name for name, _ in self.optional))
        values = {**dict(zip(names, given, strict=False)), **named}
        if len(given) > len(names) or len(values) < len(given) + len(named) or any(n not in names for n in named):
            return None
        if any(name not in values for name in self.required):
            return None
        if any(n not in taken and values.get(n, default) is not default for n, default in self.optional):
            return None
        return (*(values[n] for n in self.required), *(values.get(n, default) for n, default in self.optional))


def arguments_of(module: nn.Module) -> Arguments:
    """Of the forward of a module's class; an argument by keyword only, or without a plain default, is left out."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward = type(module).forward.__get__(module)
    parameters = inspect.signature(forward).parameters.values()
    found = [p for p in parameters if p.kind in kinds]
    required = tuple(p.name for p in found if p.default is p.empty)
    optional = tuple((p.name, p.default) for p in found if isinstance(p.default, SCALARS))
    return Arguments(required, optional, any(p.kind is p.VAR_KEYWORD for p in parameters))


@dataclass(frozen=True)
class Plan:
    """What a module's forward may compute. Subclasses add the names of the layers and the options."""

    arguments: Arguments
    layout: str = field(default=LIKE, kw_only=True)
    """How what an operator returns lies in memory; layers that are called on it, dropout, and views of it depend on
    that."""

    title: ClassVar[str]
    """What is put in place, for the report."""
    needs_example: ClassVar[str | None] = None
    """Why the plan is carried out only where an example shows a gain."""

    @property
    def probe_sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Heights and widths of the images that prove the plan."""
        return (5, 3), (4, 7)

    def read(self, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """What `run` takes, of a call with these arguments; None where the plan does not take them."""
        handed = {n: v for n, v in named.items() if n in self.keywords()} if named else {}
        others = {n: v for n, v in named.items() if n not in handed} if handed else named
        values = self.arguments.read(given, others, self.taken())
        return None if values is None or not self._fits(*values) else (values, handed)

    def _fits(self, x: Any, *rest: Any) -> bool:
        """Whether these are tokens or an image like those of the proof."""
        if not isinstance(x, Tensor) or x.dim() != self.dimensions or x.layout is not torch.strided:
            return False
        if self.arguments.convention == "image":
            return True
        size = rest[:2] if self.arguments.convention == "hw" else rest[0]
        if not isinstance(size, (tuple, list)) or len(size) != 2 or any(isinstance(n, (float, Tensor)) for n in size):
            return False
        return x.shape[1] == size[0] * size[1]

    @property
    def dimensions(self) -> int:
        """Of x."""
        return 4 if self.arguments.convention == "image" else 3

    def taken(self) -> tuple[str, ...]:
        """Names of the optional arguments that the plan takes."""
        return ()

    def keywords(self) -> tuple[str, ...]:
        """Other boolean arguments by keyword that the plan takes."""
        return ()

    def run(self, module: nn.Module, x: Tensor, *rest: Any) -> Any:
        """The module's forward through the operators; the arguments, and `keywords` if there are any, as `read` gives
        them."""
        raise NotImplementedError

    def fused(self) -> tuple[str, ...]:
        """Names of the layers whose parameters go to an operator; they are not called."""
        raise NotImplementedError

    def called(self) -> tuple[str, ...]:
        """Names of the submodules that are called as they are, with all that is inside."""
        return ()

    def evaluated(self) -> tuple[str, ...]:
        """Names of the BatchNorms whose running statistics the plan takes: it holds while they are in evaluation
        mode."""
        return ()

    def channels(self, module: nn.Module) -> int:
        """Of the input."""
        raise NotImplementedError

    def input_shape(self, module: nn.Module, height: int, width: int) -> tuple[int, ...]:
        """Of two images of this size."""
        channels = self.channels(module)
        image = self.arguments.convention == "image"
        return (2, channels, height, width) if image else (2, height * width, channels)

    def probe_shapes(self, module: nn.Module, height: int, width: int) -> tuple[tuple[int, ...], ...]:
        """Of the tensors that `as_argument` takes."""
        return (self.input_shape(module, height, width),)

    def tensor_of(self, x: Any) -> Tensor:
        """Of the first argument, a tensor with the device and dtype of the call."""
        found: Tensor = x
        return found

    def as_argument(self, tensors: list[Tensor]) -> Any:
        """The first argument of the forward."""
        return tensors[0]

    def layouts(self) -> tuple[Plan, ...]:
        """Plans that compute the same, and whose outputs lie in memory in each of the ways."""
        return tuple(replace(self, layout=layout) for layout in (LIKE, CHANNELS_FIRST, CHANNELS_LAST))

    def laid(self, image: Tensor, x: Tensor) -> Tensor:
        """An image with the layout of the plan, copied where it lies otherwise."""
        if self.layout == CHANNELS_LAST:
            return image.contiguous(memory_format=torch.channels_last)
        return image.contiguous() if self.layout == CHANNELS_FIRST or x.is_contiguous() else image

    def as_given(self, tokens: Tensor, height: int, width: int, x: Tensor) -> Tensor:
        """Tokens as the module returns them, in the layout of the plan."""
        is_image = self.arguments.convention == "image"
        if self.layout == LIKE and not is_image:
            return tokens
        image = self.laid(as_image(tokens, height, width), x)
        return image if is_image else image.flatten(2).transpose(1, 2)

    def for_training(self, module: nn.Module) -> tuple[Plan, ...]:
        """Plans that compute the same in evaluation mode and draw other random numbers in training."""
        return ()

    def options(self) -> str:
        """For the report."""
        return ""


def joined(prefix: str, name: str) -> str:
    """The name of a submodule of the submodule `prefix`."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def layers_of(module: nn.Module) -> dict[str, nn.Module]:
    """The submodules that have parameters, and BatchNorms, by name; of nested ones the outermost layer or owner of a
    parameter."""
    found: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        if isinstance(child, LAYERS) or any(p is not None for p in child._parameters.values()):
            found[name] = child
        else:
            found.update({joined(name, inner): layer for inner, layer in layers_of(child).items()})
    return found


def is_pointwise(layer: nn.Module) -> bool:
    """A linear layer, or a 1x1 convolution that is one."""
    if isinstance(layer, nn.Conv2d):
        return layer.kernel_size == (1, 1) == layer.stride and layer.groups == 1 and layer.padding in ((0, 0), "valid")
    return isinstance(layer, nn.Linear)


def is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels == layer.out_channels > 1


def features(layer: nn.Module) -> tuple[int, int]:
    """(output, input) features of a pointwise layer."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0], weight.shape[1]


def weight_and_bias(module: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """Of a linear layer or a 1x1 convolution, the weight as ``[out, in]``."""
    layer = module.get_submodule(name)
    weight: Any = layer.weight
    bias: Any = layer.bias
    return weight.flatten(1), bias


def is_norm(layer: nn.Module, channels: int) -> bool:
    """A LayerNorm over this many channels, with a weight."""
    return isinstance(layer, nn.LayerNorm) and tuple(layer.normalized_shape) == (channels,) and layer.weight is not None


def head_counts(module: nn.Module, *dividing: int) -> list[int]:
    """Numbers of heads that a module may have: its integers that divide all of these, then 1."""
    own = {v for n, v in vars(module).items() if type(v) is int and v > 1 and not n.startswith("_")}
    return [*sorted(n for n in own if all(d % n == 0 for d in dividing)), 1]


def as_tokens(convention: str, x: Tensor, rest: tuple[Any, ...]) -> tuple[Tensor, int, int]:
    """Tokens ``[B, N, C]``, height and width."""
    if convention == "image":
        return x.flatten(2).transpose(1, 2), x.shape[2], x.shape[3]
    height, width = rest[:2] if convention == "hw" else rest[0]
    return x, height, width


def as_image(tokens: Tensor, height: int, width: int) -> Tensor:
    """A view of tokens."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def may_drop(module: nn.Module) -> tuple[str, ...]:
    """Names of the submodules without parameters that may be dropout or stochastic depth."""
    leaves = [(name, child) for name, child in module.named_modules() if name and not child._modules]
    return tuple(
        name
        for name, child in leaves
        if not isinstance(child, nn.Identity)
        and known_name(child) is None
        and not child._parameters
        and not child._buffers
    )


@dataclass(frozen=True)
class Found:
    """What a structure says of a module: the plans that fit, or why there is none though the module looks alike."""

    plans: tuple[Plan, ...] = ()
    why_not: str = ""
    alike: bool = False
    """Whether a module for which no plan is true is worth a line in the report."""


NOTHING = Found()
Search = Callable[[nn.Module, dict[str, Plan]], Found]
"""Of a module, given the plans of its children by name."""
