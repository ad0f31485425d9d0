"""Whether a module computes what a plan says: by numbers, in float64, on a copy with random weights.

A module that goes to float32 by itself, as many an attention does under lower precision, stays in float64: what it
computes is compared, not where it rounds.

Weights that were set to zero or to one prove nothing, so all are random, and so are the running statistics of
BatchNorms; some are large, for bounded activations. Output and the gradient of every parameter and of the input are
compared, on images whose height is not their width, in evaluation and in training mode. Class names are no evidence:
modules of one name differ, and modules of different names are the same.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from msformer_kernels.core.backends import available_backends, use_backend
from msformer_kernels.patching.conditions import Drawn, deterministic, plain_mode, plain_tensors
from msformer_kernels.patching.plain import OF_EVERY_MODULE, held
from msformer_kernels.patching.structures import Plan

TOLERANCE = 1e-9
"""Largest relative error. That of a true plan is about 1e-14, around a softmax 1e-12; a LayerNorm's eps of 1e-6 in
place of 1e-5 gives 1e-6."""
LOUD = 9
"""Some biases and scales are as large, and one image is: ReLU and ReLU6 are the same up to 6."""


@dataclass(frozen=True)
class Results:
    """What a call returned, and gradients, if they were computed."""

    returned: type
    outputs: int
    values: list[Tensor]

    @property
    def shapes(self) -> tuple[Any, ...]:
        return (self.returned, *(value.shape for value in self.values[: self.outputs]))

    @property
    def strides(self) -> list[list[int]]:
        """Of the outputs; those of a dimension of size 1 say nothing."""
        outputs = self.values[: self.outputs]
        return [[s for s, n in zip(y.stride(), y.shape, strict=True) if n > 1] for y in outputs]

    def without_gradients(self) -> Results:
        return Results(self.returned, self.outputs, self.values[: self.outputs])


@dataclass(frozen=True)
class Witness:
    """A proved module's random parameters and buffers, and what it returned on the last image."""

    plan: Plan
    parameters: list[Tensor]
    buffers: list[Tensor]
    results: Results

    def agrees(self, module: nn.Module) -> bool:
        """Whether another module returns the same with these parameters. It is not touched."""
        own, ours = [*module.parameters(), *module.buffers()], [*self.parameters, *self.buffers]
        try:
            with plain_mode(), deterministic():
                copied = copy.deepcopy(module, {id(a): b for a, b in zip(own, ours, strict=True)}).eval()
                x, rest, named = _probe(self.plan, copied, self.plan.probe_sizes[-1])
                found = _returned(type(copied).forward(copied, x, *rest, **named))
        except Exception:  # of a module that we know nothing of
            return False
        return found.strides == self.results.strides and _deviation(found, self.results) <= TOLERANCE


class Proof:
    """Compares plans with a module. The module is not touched.

    Raises:
        ValueError: it cannot be copied.
    """

    def __init__(self, module: nn.Module) -> None:
        try:
            with plain_mode():
                copied = copy.deepcopy(module)
        except Exception as error:
            raise ValueError(f"it cannot be copied ({type(error).__name__}: {error})") from error
        for child in copied.modules():
            for hooks in (child._forward_hooks, child._forward_pre_hooks, child._backward_hooks):
                hooks.clear()  # they may do things that are not wanted here
            child._backward_pre_hooks.clear()
        with plain_mode():
            self.module = copied.cpu().double().requires_grad_(True)
            self._fill()
        self._buffers = [buffer.clone() for buffer in self.module.buffers()]
        self._attributes = _attributes(self.module)
        self._exact: dict[tuple[Any, ...], tuple[Results, Drawn]] = {}

    @torch.no_grad()
    def _fill(self) -> None:
        generator = torch.Generator().manual_seed(0)
        for parameter in self.module.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale)
            if parameter.dim() == 1:
                loud = parameter[1::2]  # of a norm or a bias
                loud.copy_(torch.linspace(-LOUD, LOUD, len(loud)))
        for norm in self.module.modules():
            if isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None:
                norm.running_mean.copy_(torch.randn(norm.running_mean.shape, generator=generator) * 0.5)
                norm.running_var.copy_(torch.rand(norm.running_var.shape, generator=generator) + 0.5)

    def error(self, plan: Plan, *, training: bool) -> float:
        """The largest relative error of output and gradients, or the first that is above `TOLERANCE`; infinite if the
        module draws random numbers and the plan others, and for outputs of another shape.

        Raises whatever the module or the plan raises.
        """
        largest = 0.0
        self._set_mode(plan, training)
        for size in plan.probe_sizes:
            with plain_mode():
                exact, drawn = self._of_the_module(plan, size, training)
                with deterministic() as drawn_here:
                    found = self._results(plan, size, _carries_out(plan, self.module), exact)
                    if drawn_here() != drawn:
                        return math.inf
            largest = max(largest, _deviation(found, exact), key=lambda e: math.inf if math.isnan(e) else e)
            if not largest <= TOLERANCE:
                break
        return largest

    def why_not_laid(self, plan: Plan, *, training: bool) -> str:
        """Why the outputs of a plan that holds otherwise are not the module's own, strides and random numbers included,
        for one image and for two, channels first and channels last in memory, or for tokens; empty if they are. A call
        that the module refuses counts for nothing."""
        self._set_mode(plan, training)
        forwards = type(self.module).forward.__get__(self.module), _carries_out(plan, self.module)
        for size, count, channels_last in _inputs(plan):
            call = _arranged(_probe(plan, self.module, size), count, channels_last)
            try:
                exact = _drawn_and_returned(forwards[0], *call)
            except Exception:  # of a module that we know nothing of
                continue
            try:
                found = _drawn_and_returned(forwards[1], *call)
            except Exception as error:
                return f"it cannot be compared ({type(error).__name__})"
            kind = "tokens" if plan.arguments.convention != "image" else "one image" if count == 1 else "images"
            given = f"{kind}, channels last" if channels_last else kind
            if found[0] != exact[0] or not _deviation(found[1], exact[1]) <= TOLERANCE:
                return f"its output is another one for {given}"
            if found[1].strides != exact[1].strides:
                return f"its output lies in memory in another way for {given}"
        return ""

    def why_not_in_training(self, plan: Plan) -> str:
        """Why a plan that holds in evaluation mode does not in training; empty if it does."""
        try:
            holds = self.error(plan, training=True) <= TOLERANCE
        except Exception as problem:  # what cannot be compared is not replaced
            return f"it cannot be compared ({type(problem).__name__})"
        drawn = any(drawn is not None for _, drawn in self._exact.values())
        if holds:  # dropout draws in the order of memory
            return self.why_not_laid(plan, training=True) if drawn and plan.arguments.convention == "image" else ""
        return "it draws random numbers" if drawn else "it computes something else"

    def keeps_dtypes(self, plan: Plan) -> bool:
        """Whether outputs have the dtype of the module's own under autocast, and below float32."""
        x, rest, named = _probe(plan, self.module, plan.probe_sizes[0])
        for dtype, autocast in ((torch.float32, True), (torch.bfloat16, False)):
            with plain_tensors(), torch.no_grad(), deterministic(), torch.autocast("cpu", torch.bfloat16, autocast):
                copied = copy.deepcopy(self.module).eval().to(dtype)
                forwards = (type(copied).forward.__get__(copied), _carries_out(plan, copied))
                try:
                    given = [y.to(dtype) for y in x] if isinstance(x, list) else x.to(dtype)
                    own, ours = (_outputs(forward(given, *rest, **named)) for forward in forwards)
                except Exception:  # of a module that we know nothing of
                    return False
                if [y.dtype for y in own] != [y.dtype for y in ours]:
                    return False
        return True

    def kept(self) -> list[tuple[str, str]]:
        """The attributes that the module's forward has set, which a plan would not set: module and name."""
        now, before = _attributes(self.module), self._attributes
        return [key for key in now if key not in before or not _is_same(now[key], before[key])]

    def witness(self, plan: Plan) -> Witness:
        """What is needed to hold modules that are alike against this one."""
        results, _ = self._of_the_module(plan, plan.probe_sizes[-1], False)
        return Witness(plan, list(self.module.parameters()), self._buffers, results.without_gradients())

    def makes_pairs(self, plan: Plan) -> bool | None:
        """Whether the module compares all pairs of tokens, as ordinary attention does; None if it does not multiply
        what it has computed at all, or cannot be called."""
        self.module.eval()
        shapes: list[list[tuple[int, ...]]] = []
        for size in plan.probe_sizes:
            x, rest, named = _probe(plan, self.module, size)
            try:
                with plain_mode(), deterministic(), Products() as products:
                    type(self.module).forward(self.module, x, *rest, **named)
            except Exception:  # of a module that we know nothing of
                return None
            shapes.append(products.shapes)
        if not shapes[0]:
            return None
        few, many = (height * width for height, width in plan.probe_sizes)
        grown = [[b - a for a, b in zip(*pair, strict=False)] for pair in zip(*shapes, strict=False)]
        return any(growth.count(many - few) > 1 for growth in grown)

    def _set_mode(self, plan: Plan, training: bool) -> None:
        """In training, too, the BatchNorms whose running statistics the plan takes are in evaluation mode."""
        self.module.train(training)
        for name in plan.evaluated():
            self.module.get_submodule(name).training = False

    def _of_the_module(self, plan: Plan, size: tuple[int, int], training: bool) -> tuple[Results, Drawn]:
        """Results of the module's own forward, and the random numbers that it drew."""
        evaluated = training and plan.evaluated()
        key = (
            plan.arguments,
            plan.taken(),
            plan.keywords(),
            plan.probe_shapes(self.module, *size),
            size,
            training,
            evaluated,
        )
        if key not in self._exact:
            with deterministic() as drawn:
                results = self._results(plan, size, type(self.module).forward.__get__(self.module))
                self._exact[key] = results, drawn()
        return self._exact[key]

    def _results(
        self, plan: Plan, size: tuple[int, int], forward: Callable[..., Any], exact: Results | None = None
    ) -> Results:
        """Of a forward and its backward; an absent gradient is zero. Without the backward where the outputs are not the
        exact ones."""
        x, rest, named = _probe(plan, self.module, size)
        with _backend():
            output = forward(x, *rest, **named)
            outputs, found = _outputs(output), _returned(output)
            if exact is not None and not _deviation(found, exact) <= TOLERANCE:
                return found
            total = sum((y * torch.arange(y.numel(), dtype=y.dtype).cos().view_as(y)).sum() for y in outputs)
            assert isinstance(total, Tensor)
            given = [*x, *rest] if isinstance(x, list) else [x, *rest]
            inputs = [*(t for t in given if isinstance(t, Tensor)), *self.module.parameters()]
            gradients = torch.autograd.grad(total, inputs, allow_unused=True)
        pairs = zip(gradients, inputs, strict=True)
        found.values.extend(torch.zeros_like(p) if g is None else g for g, p in pairs)
        return found


def _backend() -> AbstractContextManager[None]:
    return use_backend("native" if "native" in available_backends("cpu", torch.float64) else "reference")


def _carries_out(plan: Plan, module: nn.Module) -> Callable[..., Any]:
    """The forward of a module with this plan."""

    def forward(*given: Any, **named: Any) -> Any:
        call = plan.read(given, named)
        assert call is not None
        return plan.run(module, *call[0], **call[1])

    return forward


def _probe(plan: Plan, module: nn.Module, size: tuple[int, int]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The first argument and the others; on one of the images also those that the plan takes though they are
    optional."""
    generator, (height, width) = torch.Generator().manual_seed(1), size
    convention, shapes = plan.arguments.convention, plan.probe_shapes(module, height, width)
    loud = LOUD if size == plan.probe_sizes[-1] else 1

    def drawn(shape: tuple[int, ...], scale: int = 1) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()

    x = plan.as_argument([drawn(shape, loud) for shape in shapes])
    rest: tuple[Any, ...] = {"image": (), "size": ((height, width),), "hw": (height, width)}[convention or ""]
    names = [name for name, _ in plan.arguments.optional]
    if plan.taken() and size == plan.probe_sizes[-1]:
        before = [default for _, default in plan.arguments.optional[: names.index(plan.taken()[0])]]
        rest = (*rest, *before, drawn(shapes[0]))
    return x, rest, dict.fromkeys(plan.keywords(), True) if size == plan.probe_sizes[-1] else {}


class Products(TorchFunctionMode):
    """Notes the shapes of products of tensors that are no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is nn.functional.scaled_dot_product_attention:
            self.shapes.append((*args[0].shape[:-1], args[1].shape[-2]))
        elif func in _PRODUCTS:
            given = [t for value in args for t in (value if isinstance(value, (tuple, list)) else (value,))]
            if not any(isinstance(t, nn.Parameter) for t in given):
                self.shapes.append(tuple(found.shape))
        return found


_PRODUCTS = (
    *(torch.matmul, torch.bmm, torch.baddbmm, torch.einsum),
    *(Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.bmm, Tensor.baddbmm),
)


def _attributes(module: nn.Module) -> dict[tuple[str, str], Any]:
    """What all modules hold besides what every module does; of containers what is in them."""
    return {
        (name, n): held(value) if isinstance(value, (list, dict, set)) else value
        for name, child in module.named_modules()
        for n, value in vars(child).items()
        if n not in OF_EVERY_MODULE
    }


def _is_same(a: Any, b: Any) -> bool:
    if type(a) is tuple and type(b) is tuple and len(a) == len(b):
        return all(map(_is_same, a, b))
    return a is b or (isinstance(a, (int, float, str)) and a == b)


def _inputs(plan: Plan) -> list[tuple[tuple[int, int], int, bool]]:
    """Sizes, how many images, and whether they lie in memory channels last."""
    *_, last = plan.probe_sizes
    if plan.arguments.convention != "image":
        return [(last, 2, False)]
    calls = [*((size, 2) for size in plan.probe_sizes), (last, 1)]
    return [(*call, channels_last) for call in calls for channels_last in (False, True)]


def _arranged(call: Any, count: int, channels_last: bool) -> Any:
    """The arguments of a call for so many of its images, which lie in memory in one of two ways."""
    if isinstance(call, dict):
        return {name: _arranged(value, count, channels_last) for name, value in call.items()}
    if isinstance(call, (tuple, list)):
        return type(call)(_arranged(value, count, channels_last) for value in call)
    if not isinstance(call, Tensor):
        return call
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(call.dim())
    return call[:count].contiguous(memory_format=last if channels_last and last else torch.contiguous_format)


def _drawn_and_returned(
    forward: Callable[..., Any], x: Any, rest: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Drawn, Results]:
    with plain_mode(), torch.no_grad(), _backend(), deterministic() as drawn:
        found = _returned(forward(x, *rest, **named))
        return drawn(), found


def _returned(output: Any) -> Results:
    outputs = _outputs(output)
    return Results(type(output), len(outputs), [y.detach() for y in outputs])


def _outputs(output: Any) -> tuple[Tensor, ...]:
    found = output if isinstance(output, tuple) else (output,)
    if not all(isinstance(y, Tensor) for y in found):
        raise TypeError(f"it returns a {type(output).__name__}, expected a tensor or a tuple of tensors")
    return found


def _deviation(found: Results, exact: Results) -> float:
    """The largest error, relative to the exact value or, where that is small, to 1."""
    if found.shapes != exact.shapes:
        return math.inf
    pairs = zip(found.values, exact.values, strict=False)
    errors = [float((a - b).norm() / (1 + b.norm())) for a, b in pairs]
    return math.nan if any(math.isnan(e) for e in errors) else max(errors)
