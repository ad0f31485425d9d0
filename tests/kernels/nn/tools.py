"""What tools do to a submodule, each way once, and the layers written out as calls of their submodules."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize

import msformer_kernels as kernels

HEIGHT, WIDTH, DIM = 3, 4, 8


@dataclass
class Attached:
    """What a tool left behind."""

    remove: Callable[[], None] | None = None
    """Puts everything back, where the tool can."""
    changes_output: bool = True
    seen: list[Any] | None = None
    """Filled when a hook runs."""


class Adapter(nn.Module):
    """Shows weight and bias of its base, as fine-tuning libraries do, and adds to its output."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.scale = nn.Parameter(torch.tensor(0.5))

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, *arguments: Any) -> Any:
        found = self.base(*arguments)
        return (self.added(found[0]), *found[1:]) if isinstance(found, tuple) else self.added(found)

    def added(self, output: Tensor) -> Tensor:
        return output + self.scale * output.sin()


class Twice(nn.Module):
    """A parametrization."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x + 0.1


def place(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def doubled(output: Any) -> Any:
    return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output


def wrapped(model: nn.Module, path: str) -> Attached:
    base = model.get_submodule(path)
    place(model, path, Adapter(base))
    return Attached(lambda: place(model, path, base))


def subclass(model: nn.Module, path: str) -> Attached:
    """As tools that shard or quantize change the class of a module in place."""
    module = model.get_submodule(path)
    built = type(module)
    module.__class__ = type(f"Other{built.__name__}", (built,), {"forward": _doubling(built.forward)})
    return Attached(lambda: setattr(module, "__class__", built))


def _doubling(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *arguments, **options: doubled(forward(self, *arguments, **options))


def forward_hook(model: nn.Module, path: str) -> Attached:
    return Attached(
        model.get_submodule(path).register_forward_hook(lambda module, inputs, output: doubled(output)).remove
    )


def forward_pre_hook(model: nn.Module, path: str) -> Attached:
    hook = model.get_submodule(path).register_forward_pre_hook(
        lambda module, inputs: (inputs[0] + inputs[0].sin(), *inputs[1:])
    )
    return Attached(hook.remove)


def hook_with_kwargs(model: nn.Module, path: str) -> Attached:
    hook = model.get_submodule(path).register_forward_hook(
        lambda module, inputs, options, output: doubled(output), with_kwargs=True
    )
    return Attached(hook.remove)


def backward_hook(model: nn.Module, path: str) -> Attached:
    seen: list[Any] = []
    hook = model.get_submodule(path).register_full_backward_hook(lambda module, ins, outs: seen.append(outs))
    return Attached(hook.remove, changes_output=False, seen=seen)


def backward_pre_hook(model: nn.Module, path: str) -> Attached:
    seen: list[Any] = []
    hook = model.get_submodule(path).register_full_backward_pre_hook(lambda module, outs: seen.append(outs))
    return Attached(hook.remove, changes_output=False, seen=seen)


def old_backward_hook(model: nn.Module, path: str) -> Attached:
    seen: list[Any] = []
    hook = model.get_submodule(path).register_backward_hook(lambda module, ins, outs: seen.append(outs))
    return Attached(hook.remove, changes_output=False, seen=seen)


def own_forward(model: nn.Module, path: str) -> Attached:
    module: Any = model.get_submodule(path)
    forward = module.forward
    module.forward = lambda *arguments, **options: doubled(forward(*arguments, **options))
    return Attached(lambda: module.__dict__.pop("forward"))


def own_method(model: nn.Module, path: str) -> Attached:
    module: Any = model.get_submodule(path)
    module.forward = types.MethodType(_doubling(type(module).forward), module)
    return Attached(lambda: module.__dict__.pop("forward"))


def compiled(model: nn.Module, path: str) -> Attached:
    base = model.get_submodule(path)
    place(model, path, torch.compile(base, backend="eager"))
    return Attached(lambda: place(model, path, base), changes_output=False)


def compiled_in_place(model: nn.Module, path: str) -> Attached:
    model.get_submodule(path).compile(backend="eager")
    return Attached(changes_output=False)


def checkpointed(model: nn.Module, path: str) -> Attached:
    base = model.get_submodule(path)
    place(model, path, checkpoint_wrapper(base))
    return Attached(lambda: place(model, path, base), changes_output=False)


CALLS: dict[str, Callable[[nn.Module, str], Attached]] = {
    f.__name__: f
    for f in (
        wrapped,
        subclass,
        forward_hook,
        forward_pre_hook,
        hook_with_kwargs,
        backward_hook,
        backward_pre_hook,
        old_backward_hook,
        own_forward,
        own_method,
        compiled,
        compiled_in_place,
        checkpointed,
    )
}
"""Of the call of a submodule; for any."""


def parametrized(model: nn.Module, path: str) -> Attached:
    module = model.get_submodule(path)
    parametrize.register_parametrization(module, "weight", Twice())
    return Attached(lambda: parametrize.remove_parametrizations(module, "weight", leave_parametrized=False))


def parametrized_bias(model: nn.Module, path: str) -> Attached:
    module = model.get_submodule(path)
    parametrize.register_parametrization(module, "bias", Twice())
    return Attached(lambda: parametrize.remove_parametrizations(module, "bias", leave_parametrized=False))


def weight_norm(model: nn.Module, path: str) -> Attached:
    module = parametrizations.weight_norm(model.get_submodule(path))
    with torch.no_grad():
        module.parametrizations.weight.original0.mul_(2)
    return Attached()


def spectral_norm(model: nn.Module, path: str) -> Attached:
    parametrizations.spectral_norm(model.get_submodule(path).eval())
    return Attached()


def old_weight_norm(model: nn.Module, path: str) -> Attached:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = nn.utils.weight_norm(model.get_submodule(path))
    with torch.no_grad():
        module.weight_g.mul_(2)  # the weight itself changes when the module is called
    return Attached()


def old_spectral_norm(model: nn.Module, path: str) -> Attached:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.spectral_norm(model.get_submodule(path).eval())
    return Attached()


def pruned(model: nn.Module, path: str) -> Attached:
    module = model.get_submodule(path)
    nn.utils.prune.random_unstructured(module, "weight", 0.5)
    with torch.no_grad():
        module.weight_orig.mul_(2)
    return Attached(lambda: (nn.utils.prune.remove(module, "weight"), None)[1])


def narrow_weight(model: nn.Module, path: str) -> Attached:
    module: Any = model.get_submodule(path)
    module.weight = nn.Parameter(Stored(module.weight.detach().bfloat16()), requires_grad=False)
    return Attached()


WEIGHTS: dict[str, Callable[[nn.Module, str], Attached]] = {
    f.__name__: f
    for f in (
        parametrized,
        parametrized_bias,
        weight_norm,
        spectral_norm,
        old_weight_norm,
        old_spectral_norm,
        pruned,
        narrow_weight,
    )
}
"""Of the parameters of a submodule; for those that have some."""


class Stored(Tensor):
    """A tensor that is stored in bfloat16 and is float32 for every operation, as a quantized weight."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Stored:
        return Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=torch.float32)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Stored:
        return Stored(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)

        def wide(x: Any) -> Any:
            return x.inner.float() if isinstance(x, cls) else x

        return func(*torch.utils._pytree.tree_map(wide, args), **(kwargs or {}))


def written_out(layer: Any, x: Tensor) -> list[Tensor]:
    """Outputs of a layer on an image of 3 x 4, by calls of its submodules."""
    if isinstance(layer, kernels.EfficientTransformerBlock):
        attended, context = outputs(layer.attn, layer.norm1(x))
        x = x + attended
        return [x + outputs(layer.mlp, layer.norm2(x))[0], context]
    if isinstance(layer, kernels.EfficientAttention):
        image = x.transpose(1, 2).unflatten(2, (HEIGHT, WIDTH))
        query, key, value = (
            projection(image).flatten(2).unflatten(1, (layer.num_heads, -1)).transpose(2, 3)
            for projection in (layer.queries, layer.keys, layer.values)
        )
        attended, context = kernels.efficient_attention(query, key, value, backend="reference")
        attended = attended.transpose(2, 3).flatten(1, 2).unflatten(2, (HEIGHT, WIDTH))
        return [layer.reprojection(attended).flatten(2).transpose(1, 2), context]
    assert isinstance(layer, kernels.MixFFN)
    hidden = layer.fc1(x)
    mixed = layer.dwconv(hidden, HEIGHT, WIDTH)
    mixed = mixed + hidden if layer.skip else mixed
    mixed = mixed if layer.norm1 is None else layer.norm1(mixed)
    return [layer.fc2(F.gelu(mixed))]


def outputs(layer: Any, x: Tensor) -> list[Tensor]:
    """Of a call of a layer, or of what wraps it or takes its place, on an image of 3 x 4."""
    base = layer
    while isinstance(base, Adapter):
        base = base.base
    attends = (
        "Attention" in type(getattr(base, "_orig_mod", getattr(base, "_checkpoint_wrapped_module", base))).__name__
    )
    found = layer(x) if attends else layer(x, HEIGHT, WIDTH)
    return list(found) if isinstance(found, tuple) else [found]
