"""One operator, declared once.

The reference of an operator, its specification in plain PyTorch, is also its declaration: the names, order, kinds and
defaults of the parameters are read from its signature when the operator is made. From them follow the schemas of
``msformer::<name>`` and ``msformer::<name>_backward``, their fake kernels, autograd and autocast (registration.py), the
public function, and the named tuple in which a call reaches a backend. Positions are counted then, never in a call.

A backend's module has two functions:

- ``forward(call)`` returns all outputs of the op. `call` is a named tuple with the fields of the signature, tensors
  validated.
- ``backward(call, saved, grads)`` returns the gradients of `Operator.differentiable`, in that order, zero-size for an
  absent tensor. `saved` is a named tuple of all outputs of the forward but the first, `grads` one of the gradients of
  `Operator.outputs` (that of the first is always a tensor) and of the flags `Operator.skippable`.
"""

from __future__ import annotations

import functools
import inspect
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, Generic, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from msformer_kernels.core import backends
from msformer_kernels.core.reference import Reference
from msformer_kernels.core.registration import Registration
from msformer_kernels.core.transforms import is_wrapper, logger
from msformer_kernels.core.validation import check_same_kind

P = ParamSpec("P")
R = TypeVar("R")

SCHEMA_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "int": "SymInt",
    "float": "float",
    "bool": "bool",
    "str": "str",
}
"""The kinds that a parameter may have, by annotation."""

OPERATORS: dict[str, Operator[Any]] = {}
"""By name, in the order of their declaration."""
_READABLE = frozenset([Tensor, torch.nn.Parameter, int, float, bool, str, type(None)])


class Operator(Generic[R]):
    """The declaration of an operator.

    Args:
        reference: the specification, with one parameter of a kind in `SCHEMA_TYPES` for each of the operator. It
            returns `outputs` and `statistics`, as a tuple if there are several.
        outputs: names of what is returned and differentiated.
        statistics: of what is returned as well, but not differentiated.
        state: of what the op returns besides, for its backward alone.
        fake: makes empty tensors like the op's outputs (`outputs`, `statistics`, `state`) from a call.
        served_by: the backends with kernels for it, besides the reference. Their modules lie beside the reference.
        activations: the tensors that the layer works on; the other differentiable ones are its `parameters`.
        without_gradient: tensors that are not differentiated.
        zero_gradient: tensors whose gradient is exactly zero; no backend computes it.
        wide_parameters: whether its parameters may be float32 beside narrower activations.
        products: the multiplications of its matrix products and convolutions, of a call; an addition comes with each.
        per_image: whether it works on every image of a batch by itself, so that all its outputs are batches, too.
        matrices: weights of linear layers, which may also come as those of 1 x 1 convolutions, ``[out, in, 1, 1]``.
        skippable: activations whose gradient a backward need not make: `grads.<name>_wanted` tells it.
        autocast: what a call does under autocast, see `Registration`; None leaves it alone.
        keeps_layout: whether its output, and the gradients of its activations, lie in memory as the activations do
            (`core.layout.room_like`); so do the gradients of its parameters then.
        limits: by backend, a function of a call that returns why the backend cannot serve it, or None.

    Raises:
        TypeError: a parameter of the reference that is of no known kind.
    """

    def __init__(
        self,
        reference: Callable[..., R],
        *,
        outputs: Sequence[str],
        fake: Callable[[Any], tuple[Tensor, ...]],
        products: Callable[[Any], int],
        served_by: Sequence[str],
        statistics: Sequence[str] = (),
        state: Sequence[str] = (),
        activations: Sequence[str] = ("x",),
        without_gradient: Sequence[str] = (),
        zero_gradient: Sequence[str] = (),
        wide_parameters: bool = False,
        per_image: bool = True,
        matrices: Sequence[str] = (),
        skippable: Sequence[str] = (),
        keeps_layout: bool = False,
        autocast: Callable[..., Any] | None = None,
        limits: Mapping[str, Callable[[Any], str | None]] | None = None,
    ) -> None:
        self.name = reference.__name__
        self.reference = reference
        self.fake, self.products = fake, products
        self.served_by = tuple(served_by)
        self.limits = limits or {}
        self.keeps_layout = keeps_layout
        self.per_image = per_image
        signature = inspect.signature(reference)
        self.names = tuple(signature.parameters)
        self.types = {p.name: self._schema_type(p) for p in signature.parameters.values()}
        self.outputs, self.statistics = tuple(outputs), tuple(statistics)
        self.kept = (*self.outputs[1:], *self.statistics, *state)
        self.zero_gradient, self.skippable = tuple(zero_gradient), tuple(skippable)
        self.tensors = tuple(name for name in self.names if self.types[name].startswith("Tensor"))
        self.differentiable = tuple(n for n in self.tensors if n not in (*without_gradient, *zero_gradient))
        self.parameters = tuple(n for n in self.differentiable if n not in activations)
        self.call_type: Any = namedtuple(f"{self.name}_call", self.names)  # type: ignore[misc]
        self._positions = {name: i for i, name in enumerate(self.names)}
        self.matrices = tuple(matrices)
        self._matrices = tuple((name, self._positions[name]) for name in matrices)
        floating = [n for n in self.tensors if n in self.differentiable or n in zero_gradient]
        wide = [wide_parameters and n in self.parameters for n in floating]
        self._floating = tuple(zip(floating, self.positions(floating), wide, strict=True))
        self._parameter_positions = self.positions(self.parameters)
        self._defaults = tuple(p.default for p in signature.parameters.values())
        kinds = [p.kind is p.KEYWORD_ONLY for p in signature.parameters.values()]
        self._by_position = kinds.index(True) if True in kinds else len(kinds)
        self._returned = len(self.outputs) + len(self.statistics)
        self._checked: dict[tuple[str, torch.device, torch.dtype], Any] = {}
        self.op = Registration(self, autocast).op
        OPERATORS[self.name] = self

    def _schema_type(self, parameter: inspect.Parameter) -> str:
        if parameter.annotation not in SCHEMA_TYPES:
            known = ", ".join(SCHEMA_TYPES)
            raise TypeError(
                f"{self.name}: {parameter.name} is annotated {parameter.annotation!r}, expected one of {known}"
            )
        return SCHEMA_TYPES[parameter.annotation]

    def positions(self, names: Sequence[str]) -> tuple[int, ...]:
        """Where parameters of these names stand in a call."""
        return tuple(self._positions[name] for name in names)

    def parameters_of(self, call: Any) -> tuple[Tensor | None, ...]:
        """The tensors of a call that are differentiable and no activations, in the order of the signature."""
        return tuple([call[i] for i in self._parameter_positions])

    def matrices_of(self, call: Any) -> list[Tensor]:
        """The weights of linear layers of a call."""
        return [call[i] for _, i in self._matrices]

    def why_not(self, backend: str, call: Sequence[Any] | None = None) -> str | None:
        """Why a backend that is there cannot serve this operator, or the call with these values; None if it can."""
        if backend == "reference":
            return None
        if backend not in self.served_by:
            return f"it has no kernels for {self.name}"
        limit = self.limits.get(backend)
        return None if limit is None or call is None else limit(self.call_type._make(call))

    def implementation(self, backend: str | None, call: Any) -> Any:
        """The module that serves a call now; without a backend the one that the machine decides on.

        Raises ValueError for an unknown backend and BackendError for one that cannot serve the call.
        """
        first = call[0]
        key = (backend, first.device, first.dtype)
        found = self._checked.get(key)  # type: ignore[arg-type]
        limit = self.limits.get(backend) if backend is not None else None
        if found is None or (limit is not None and limit(call) is not None):
            name = backends.when_run(self, backend, first.device.type, first.dtype, call)
            found = self._load(name)
            if backend is not None:
                self._checked[key] = found  # type: ignore[index]
        return found

    def _load(self, backend: str) -> Any:
        if backend == "reference":
            return Reference(self)
        package = self.reference.__module__.rpartition(".")[0]
        return import_module(f"{package}.{backends.MODULES[backend]}")

    def run_reference(self, call: Sequence[Any]) -> R:
        """The reference, as it is: plain PyTorch, differentiable any number of times."""
        options = dict(zip(self.names[self._by_position :], call[self._by_position :], strict=True))
        return self.reference(*call[: self._by_position], **options)

    def public(self, check: Callable[P, None]) -> Callable[P, R]:
        """Makes the public function of a check of the arguments, which has its signature and docstring.

        The function checks, chooses the backend and runs it. Its attribute `explain` takes the same arguments and tells
        which backend the call would get, and why (`msformer_kernels.explain` says it for a device and dtype).

        Raises TypeError where the signature is not that of the reference, plus `backend`.
        """
        expected = [(p.name, p.kind, p.default) for p in inspect.signature(self.reference).parameters.values()]
        expected.append(("backend", inspect.Parameter.KEYWORD_ONLY, None))
        signature = inspect.signature(check)
        if [(p.name, p.kind, p.default) for p in signature.parameters.values()] != expected:
            raise TypeError(f"{self.name}: the signatures of the public function and of the reference differ")

        floating, positions, defaults, matrices = self._floating, self._positions, self._defaults, self._matrices

        def bound(arguments: Sequence[Any], options: Mapping[str, Any]) -> list[Any]:
            for name, i in matrices:
                weight = arguments[i] if i < len(arguments) else options.get(name)
                if isinstance(weight, Tensor) and weight.dim() == 4 and weight.shape[2:] == (1, 1):
                    if i < len(arguments):
                        arguments = [*arguments[:i], weight.flatten(1), *arguments[i + 1 :]]
                    else:
                        options = {**options, name: weight.flatten(1)}
            check(*arguments, **options)
            call = [*arguments, *defaults[len(arguments) :]]
            for name, value in options.items():
                call[positions[name]] = value
            check_same_kind(floating, call)
            return call

        @functools.wraps(check)
        def function(*arguments: Any, backend: str | None = None, **options: Any) -> Any:
            call = bound(arguments, options)
            first = call[0]
            chosen = backends.choose(self, backend, first.device.type, first.dtype, call)
            if chosen == "reference":
                return self.run_reference(call)
            # TorchDynamo of torch 2.8 cannot trace issuperset, which only spares eager calls a slower question
            readable = not torch.compiler.is_compiling() and _READABLE.issuperset(map(type, call))
            if not readable and any(map(is_wrapper, call)):
                if not torch.compiler.is_compiling():
                    logger.debug("%s: tensors made of others, such as DTensors: by the reference", self.name)
                return self.run_reference(call)
            found = self.op(*call, chosen)
            if isinstance(found, Tensor):
                return found
            return found[: self._returned] if self._returned > 1 else found[0]

        def explain(*arguments: Any, backend: str | None = None, **options: Any) -> backends.Explanation:
            call = bound(arguments, options)
            return backends.explain_call(self, backend, call[0].device.type, call[0].dtype, call)

        returns = inspect.signature(self.reference).return_annotation
        function.__signature__ = signature.replace(return_annotation=returns)  # type: ignore[attr-defined]
        function.__annotations__ = {**check.__annotations__, "return": returns}
        function.explain = explain  # type: ignore[attr-defined]
        return cast(Callable[P, R], function)
