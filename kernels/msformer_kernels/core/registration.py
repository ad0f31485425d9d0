"""How an operator becomes ops of PyTorch: schemas, kernels, fake kernels, autograd, autocast.

Every operator is one op ``msformer::<name>`` with a ``backend`` argument, and one ``msformer::<name>_backward``. Eager
calls name the backend that was chosen, graphs only one that the user chose; a kernel without one decides when it runs.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from msformer_kernels.core.autograd import register_autograd
from msformer_kernels.core.layout import room_like
from msformer_kernels.core.precision import arithmetic_dtype

if TYPE_CHECKING:
    from msformer_kernels.core.operator import Operator

_named = tuple.__new__  # of a named tuple's type and its values, without counting them
LIBRARY = torch.library.Library("msformer", "DEF")


class Registration:
    """The two ops of an operator.

    `autocast` is ``rule(operator, op, device_type, dtype, args)``, where `op` calls below autocast; see `cast_inputs`
    and `cast_output`.
    """

    def __init__(self, operator: Operator[Any], autocast: Callable[..., Any] | None) -> None:
        self.operator, self._call = operator, operator.call_type
        name, backward = operator.name, f"{operator.name}_backward"
        gradients = namedtuple(  # type: ignore[misc]
            f"{name}_gradients", [*operator.outputs, *(f"{n}_wanted" for n in operator.skippable)]
        )
        self._gradients: Any = gradients
        self._saved: Any = namedtuple(f"{name}_saved", operator.kept)  # type: ignore[misc]
        # the arguments of a call, and the backend: which are tensors, which are not, how they are put together again
        tensors = operator.positions(operator.tensors)
        options = [i for i in range(len(operator.names) + 1) if i not in tensors]
        self._tensors, self._number_of_tensors = itemgetter(*tensors), len(tensors)
        self._options = itemgetter(*options, options[-1])  # at least two, so that it is a tuple
        order = [*tensors, *options]
        self._together = itemgetter(*(order.index(i) for i in range(len(order))))
        self._differentiable = operator.positions(operator.differentiable)
        self._zero = operator.positions(operator.zero_gradient)
        self._skippable = operator.positions(operator.skippable)
        self._not_differentiable = len(operator.outputs)
        self._grads, self._kept = len(gradients._fields), len(operator.kept)

        arguments = ", ".join(f"{kind} {n}" for n, kind in operator.types.items())
        returned = ", ".join(f"Tensor {n}" for n in (operator.outputs[0], *operator.kept))
        self._define(name, f"({arguments}, str? backend) -> ({returned})", self._forward, self._fake)
        incoming = [f"Tensor grad_{operator.outputs[0]}", *(f"Tensor? grad_{n}" for n in operator.outputs[1:])]
        incoming += [f"bool {n}_wanted" for n in operator.skippable]
        kept = [f"Tensor {n}" for n in operator.kept]
        results = ", ".join("Tensor" for _ in operator.differentiable)
        schema = f"({', '.join([*incoming, arguments, *kept])}, str? backend) -> ({results})"
        self._define(backward, schema, self._backward, self._backward_fake)
        self.op = getattr(torch.ops.msformer, name).default
        self._backward_op = getattr(torch.ops.msformer, backward).default
        register_autograd(LIBRARY, name, self._keep, self._differentiate)
        refuse_second_derivative(backward, name)
        if autocast is not None:
            self._define_autocast(name, autocast)

    def _define(self, name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
        LIBRARY.define(f"{name}{schema}")
        LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"msformer::{name}", fake, lib=LIBRARY)

    def _forward(self, *args: Any) -> Any:
        call = _named(self._call, args[:-1])
        forward = self.operator.implementation(args[-1], call).forward
        if not args[0].is_cuda:
            return forward(call)
        with torch.cuda.device(args[0].device):  # what a kernel launches and allocates
            return forward(call)

    def _fake(self, *args: Any) -> Any:
        found = self.operator.fake(_named(self._call, args[:-1]))
        return found if len(found) > 1 else found[0]

    def _parts(self, args: tuple[Any, ...]) -> tuple[Any, Any, Any]:
        """Call, saved outputs and gradients among the arguments of the backward op."""
        start, end = self._grads, len(args) - 1 - self._kept
        call, saved = _named(self._call, args[start:end]), _named(self._saved, args[end:-1])
        return call, saved, _named(self._gradients, args[:start])

    def _backward(self, *args: Any) -> tuple[Tensor, ...]:
        call, saved, grads = self._parts(args)
        backward = self.operator.implementation(args[-1], call).backward
        if not args[0].is_cuda:
            return backward(call, saved, grads)
        with torch.cuda.device(args[0].device):
            return backward(call, saved, grads)

    def _backward_fake(self, *args: Any) -> tuple[Tensor, ...]:
        call, _, grads = self._parts(args)
        first, wide = call[0], arithmetic_dtype(call[0].dtype)
        unwanted = {n for n in self.operator.skippable if not getattr(grads, f"{n}_wanted")}
        return tuple(
            first.new_empty(0)
            if name in unwanted
            else first.new_empty(0, dtype=wide)
            if call[i] is None
            else room_like(call[i])
            if self.operator.keeps_layout
            else call[i].new_empty(call[i].shape)
            for name, i in zip(self.operator.differentiable, self._differentiable, strict=True)
        )

    def _keep(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        if self._kept:
            ctx.mark_non_differentiable(*output[self._not_differentiable :])
            ctx.save_for_backward(*self._tensors(inputs), *output[1:])
            ctx.output_shape = output[0].shape
        else:
            ctx.save_for_backward(*self._tensors(inputs))
            ctx.output_shape = output.shape
        ctx.options = self._options(inputs)

    def _differentiate(self, ctx: Any, *given: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        count = self._number_of_tensors
        arguments = self._together((*saved[:count], *ctx.options))
        grad_output = given[0]
        if grad_output is None:
            grad_output = arguments[0].new_zeros(1).expand(ctx.output_shape)
        needs = ctx.needs_input_grad[1:] if self._skippable else ()  # the first one is not of the op
        wanted = [needs[i] for i in self._skippable]
        grads = given[1 : self._not_differentiable]
        found = self._backward_op(grad_output, *grads, *wanted, *arguments[:-1], *saved[count:], arguments[-1])
        result: list[Tensor | None] = [None] * len(arguments)
        for i, gradient in zip(self._differentiable, found, strict=True):
            if arguments[i] is not None:
                result[i] = gradient
        for i in self._skippable:
            if not needs[i]:
                result[i] = None
        for i in self._zero:
            if arguments[i] is not None:
                result[i] = torch.zeros_like(arguments[i])
        return tuple(result)

    def _define_autocast(self, name: str, rule: Callable[..., Any]) -> None:
        op = getattr(torch.ops.msformer, name)
        for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

            def kernel(*args: Any, _device: str = device, _keys: torch._C.DispatchKeySet = keys) -> Any:
                with torch._C._ExcludeDispatchKeyGuard(_keys):
                    return rule(self.operator, op, _device, torch.get_autocast_dtype(_device), args)

            LIBRARY.impl(name, kernel, key)


def cast_inputs(operator: Operator[Any], op: Any, device_type: str, dtype: torch.dtype, args: tuple[Any, ...]) -> Any:
    """Autocast of an operator without parameters: all its tensors in autocast's dtype, but float64."""
    if args[0].dtype == torch.float64:
        return op(*args)
    values = list(args)
    for i in operator.positions(operator.differentiable):
        values[i] = values[i].to(dtype)
    return op(*values)


def cast_output(operator: Operator[Any], op: Any, device_type: str, dtype: torch.dtype, args: tuple[Any, ...]) -> Any:
    """Autocast of a layer. The kernels of the CPU compute in float32 whatever comes in, so nothing is cast on the way
    in; on a GPU the dtype of the activations decides. A sum with the residual has the dtype of the activations."""
    x = args[0]
    if x.dtype == torch.float64:
        return op(*args)
    at = operator.positions(["residual"])[0] if "residual" in operator.names else None
    residual = at is not None and args[at]
    if device_type == "cpu":
        found = op(*args)
        return found if residual else _with_first(found, lambda output: output.to(dtype))
    values = [x.to(dtype), *args[1:]]
    if at is not None:
        values[at] = False
    found = op(*values)
    return _with_first(found, lambda output: x + output) if residual else found


def _with_first(found: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return change(found) if isinstance(found, Tensor) else (change(found[0]), *found[1:])


def refuse_second_derivative(name: str, operator: str) -> None:
    """Makes differentiating the op ``<name>``, itself a backward, an error that says what to do."""

    def keep(ctx: Any, arguments: tuple[Any, ...], outputs: Any) -> None:
        pass

    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        raise NotImplementedError(
            f"{operator}: second derivatives are not supported by the compiled kernels; "
            'use backend="reference" (or use_backend("reference")), which is differentiable any number of times'
        )

    register_autograd(LIBRARY, name, keep, backward)


def refuse_transforms(operator: str) -> None:
    """Raises where the compiled kernels would give silently wrong tangents, or PyTorch an error that says nothing.

    Forward-mode differentiation and the transforms of `torch.func` need more than a backward; the reference has it.
    """
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            f"{operator}: forward-mode differentiation and torch.func are not supported by the compiled kernels; "
            'use backend="reference" (or use_backend("reference"))'
        )
