"""How an operator becomes ops of PyTorch: schemas, kernels, fake kernels, autograd, autocast.

Every operator is one op ``msformer::<name>`` with a ``backend`` argument, and one ``msformer::<name>_backward``. Eager
calls name the backend that was chosen, graphs only one that the user chose; a kernel without one decides when it runs.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from msformer_kernels.core.autograd import register_autograd
from msformer_kernels.core.flops import count_flops
from msformer_kernels.core.layout import room_like
from msformer_kernels.core.precision import arithmetic_dtype
from msformer_kernels.core.reference import Reference
from msformer_kernels.core.transforms import in_forward_mode, logger, register_vmap

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
        self._parameters = operator.positions((*operator.parameters, *operator.zero_gradient))
        self._activations = [i for i in tensors if i not in self._parameters]
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
        self._reference = Reference(operator)
        register_autograd(LIBRARY, name, self._keep, self._differentiate, self._forward_of_reference)
        register_autograd(LIBRARY, backward, self._keep_all, self._differentiate_again, self._backward_of_reference)
        register_vmap(LIBRARY, name, self._batched)
        register_vmap(LIBRARY, backward, self._batched_backward)
        # of FlopCounterMode: as many as the reference has
        count_flops(getattr(torch.ops.msformer, name), self._flops)
        count_flops(getattr(torch.ops.msformer, backward), self._backward_flops)
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
        unwanted = self._unwanted(grads)
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
        if in_forward_mode():
            call = _named(self._call, arguments[:-1])
            found = self._gradients_of_reference(call, _named(self._gradients, (grad_output, *grads, *wanted)))
        else:
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

    def _keep_all(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Saves what `_differentiate_again` needs: all arguments of the backward op but the saved outputs."""
        ctx.set_materialize_grads(False)
        call, _, grads = self._parts(inputs)
        ctx.save_for_backward(*self._tensors((*call, None)), *grads[: self._not_differentiable])
        ctx.options, ctx.wanted = self._options((*call, None)), grads[self._not_differentiable :]

    def _differentiate_again(self, ctx: Any, *given: Tensor | None) -> tuple[Any, ...]:
        saved, count, operator = ctx.saved_tensors, self._number_of_tensors, self.operator
        logger.debug("%s: derivative of its backward, by the reference", operator.name)
        call = _named(self._call, self._together((*saved[:count], *ctx.options))[:-1])
        grads = _named(self._gradients, (*saved[count:], *ctx.wanted))
        unwanted = self._unwanted(grads)
        of_gradients = {
            name: gradient
            for name, gradient in zip(operator.differentiable, given, strict=True)
            if gradient is not None and name not in unwanted and getattr(call, name) is not None
        }
        of_call, of_grads = self._reference.second_backward(call, grads, of_gradients) if of_gradients else ({}, {})
        found = [of_grads.get(name) for name in operator.outputs] + [None] * len(operator.skippable)
        found += [of_call.get(name) for name in operator.names]
        return (*found, *[None] * self._kept, None)

    def _forward_of_reference(self, *args: Any) -> Any:
        logger.debug("%s: forward mode, by the reference", self.operator.name)
        return self._reference.differentiable_forward(_named(self._call, args[:-1]))

    def _backward_of_reference(self, *args: Any) -> tuple[Tensor, ...]:
        call, _, grads = self._parts(args)
        return self._gradients_of_reference(call, grads)

    def _gradients_of_reference(self, call: Any, grads: Any) -> tuple[Tensor, ...]:
        """What the backward op returns, differentiable."""
        logger.debug("%s: forward mode, its backward by the reference", self.operator.name)
        found = self._reference.differentiable_backward(call, grads)
        unwanted = self._unwanted(grads)
        return tuple(
            found[name] if name in found and name not in unwanted else call[0].new_empty(0)
            for name in self.operator.differentiable
        )

    def _unwanted(self, grads: Any) -> set[str]:
        return {n for n in self.operator.skippable if not getattr(grads, f"{n}_wanted")}

    def _batched(self, args: Sequence[Any], in_dims: Sequence[int | None]) -> Sequence[int] | None:
        """See `register_vmap`: slices may be one call if they share their parameters."""
        shared = all(in_dims[i] is None for i in self._parameters)
        return self._activations if self.operator.per_image and shared else None

    def _batched_backward(self, args: Sequence[Any], in_dims: Sequence[int | None]) -> Sequence[int] | None:
        """Likewise if there are no parameters, whose gradients are sums over the batch of one slice."""
        call, _, _ = self._parts(tuple(args))
        if not self.operator.per_image or any(call[i] is not None for i in self._parameters):
            return None
        return [i for i, value in enumerate(args) if isinstance(value, Tensor)]

    def _flops(self, *args: Any, **_: Any) -> int:
        return 2 * self.operator.products(_named(self._call, args[:-1]))

    def _backward_flops(self, *args: Any, **_: Any) -> int:
        """A product has two gradients, each a product; that of the activations may be unwanted."""
        call, _saved, grads = self._parts(args)
        return (1 if self._unwanted(grads) else 2) * 2 * self.operator.products(call)

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
        if values[i] is not None:
            values[i] = values[i].to(dtype)
    return op(*values)


def cast_output(operator: Operator[Any], op: Any, device_type: str, dtype: torch.dtype, args: tuple[Any, ...]) -> Any:
    """Autocast of a layer. The kernels of the CPU take activations as they come, and multiply in bfloat16 where the
    weights of linear layers are bfloat16; on a GPU the dtype of the activations decides. A sum with the residual has
    the dtype of the activations."""
    x = args[0]
    if x.dtype == torch.float64:
        return op(*args)
    at = operator.positions(["residual"])[0] if "residual" in operator.names else None
    residual = at is not None and args[at]
    if device_type == "cpu":
        values = list(args)
        if x.dtype == torch.float32 and dtype == torch.bfloat16:
            for i in operator.positions(operator.matrices):
                values[i] = values[i].to(dtype)
        found = op(*values)
        return found if residual else _with_first(found, lambda output: output.to(dtype))
    values = [x.to(dtype), *args[1:]]
    if at is not None:
        values[at] = False
    found = op(*values)
    return _with_first(found, lambda output: x + output) if residual else found


def _with_first(found: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return change(found) if isinstance(found, Tensor) else (change(found[0]), *found[1:])
