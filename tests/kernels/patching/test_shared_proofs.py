"""Modules that are alike share one proof; whatever a proof may depend on keeps them apart."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import msformer_kernels as kernels
from msformer_kernels.patching import match, proof
from msformer_kernels.patching.likeness import likeness
from tests.kernels.patching.models import mix_ffns

X, SIZE = torch.randn(2, 24, 8, generator=torch.Generator().manual_seed(0)), (6, 4)
OUTSIDE: weakref.WeakKeyDictionary[nn.Module, float] = weakref.WeakKeyDictionary()


class Options:
    """An object that is no module."""

    def __init__(self, factor: Any = 1.0) -> None:
        self.factor = factor

    def __call__(self, x: Tensor) -> Tensor:
        return self.factor * x


class Scaled(mix_ffns.DenseMixFFN):
    """MixFFN times what its attributes say: a number, a flag, a word, functions, an object, or what lies outside."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.number: Any = 1.0
        self.flag, self.word = False, "one"
        self.function: Callable[[Tensor], Tensor] = identity
        self.partial = partial(times, factor=1.0)
        self.options = Options()
        self.numbers: Any = [1.0]
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, hidden_states: Tensor, height: int, width: int) -> Tensor:
        x = super().forward(hidden_states, height, width)
        x = x * self.number * (2 if self.flag else 1) * {"one": 1, "two": 2}[self.word] * self.numbers[0]
        x = x * OUTSIDE.get(self, 1.0)
        return self.partial(self.function(self.options(x)))


def identity(x: Tensor) -> Tensor:
    return x


def times(x: Tensor, factor: float) -> Tensor:
    return factor * x


def closure(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x: factor * x


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, given, output: 2 * output)


def own_forward(module: Any) -> None:
    original = module.forward
    module.forward = lambda *given: 2 * original(*given)


def own_forward_inside(module: Any) -> None:
    own_forward(module.dense2)


def buffered(module: nn.Module) -> None:
    module.register_buffer("more", torch.ones(1))


def tied(module: Any) -> None:
    module.dense1.bias = module.dwconv.dwconv.bias


def frozen(module: Any) -> None:
    module.dense1.weight.requires_grad_(False)


def dropped(module: Any) -> None:
    module.dropout.p = 0.5


def trained(module: Any) -> None:
    module.dense1.train()


def marked(module: Any) -> None:
    module.dense1.weight.factor = 2.0


DIFFERENCES: dict[str, Callable[[Any], object]] = {
    "number": lambda m: setattr(m, "number", 2.0),
    "number of another type": lambda m: setattr(m, "number", 1),
    "flag": lambda m: setattr(m, "flag", True),
    "word": lambda m: setattr(m, "word", "two"),
    "closure": lambda m: setattr(m, "function", closure(2.0)),
    "partial": lambda m: setattr(m, "partial", partial(times, factor=2.0)),
    "object": lambda m: setattr(m, "options", Options(2.0)),
    "list": lambda m: setattr(m, "numbers", [2.0]),
    "tensor": lambda m: setattr(m, "numbers", torch.tensor([2.0])),
    "settings of a layer": lambda m: setattr(m.dwconv.dwconv, "padding_mode", "circular"),
    "width": lambda m: setattr(m, "dense2", nn.Linear(16, 5)),
    "dtype": lambda m: m.double(),
    "class of a layer": lambda m: setattr(m, "intermediate_act_fn", nn.ReLU()),
    **{f.__name__: f for f in (hooked, own_forward, own_forward_inside, buffered, tied, frozen)},
    **{f.__name__: f for f in (dropped, trained, marked)},
}


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules of which proofs are made."""
    made: list[nn.Module] = []

    class Counted(proof.Proof):
        def __init__(self, module: nn.Module) -> None:
            made.append(module)
            super().__init__(module)

    monkeypatch.setattr(match, "Proof", Counted)
    return made


def test_modules_that_are_alike_share_a_proof(proofs: list[nn.Module]) -> None:
    """Parameters differ; each has an object of its own."""
    model = nn.ModuleList(Scaled() for _ in range(3))
    report = kernels.patch(model)
    assert proofs == [model[2]]
    assert [(r.name, r.note) for r in report.replaced] == [("0", "as 2"), ("1", "as 2"), ("2", "")]
    assert len({r.error for r in report.replaced}) == 1
    for module in model:
        original = Scaled()
        original.load_state_dict(module.state_dict())
        torch.testing.assert_close(module(X, *SIZE), original(X, *SIZE), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_what_differs_does_not_share(name: str) -> None:
    """Whichever of the two is proved first: what comes out is what the module computes."""
    for at in (0, 1):
        model = nn.ModuleList(Scaled() for _ in range(2)).eval()
        DIFFERENCES[name](model[at])
        originals = copy.deepcopy(model)
        assert likeness(model[0]) is None or likeness(model[0]) != likeness(model[1])
        report = kernels.patch(model)
        assert not any(r.note.startswith("as ") for r in report.replaced)
        for module, original in zip(model, originals, strict=True):
            x = X.double() if next(module.parameters()).dtype == torch.float64 else X
            assert module.training == original.training
            torch.testing.assert_close(module(x, *SIZE), original(x, *SIZE), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("at", [0, 1])
def test_what_cannot_be_seen_shows_in_the_output(
    at: int, proofs: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number that lies outside of the modules. The last module is proved first; where it is left alone, so is the
    other."""
    model = nn.ModuleList(Scaled() for _ in range(2)).eval()
    OUTSIDE[model[at]] = 2.0
    monkeypatch.setattr(Scaled, "__deepcopy__", _keeps_what_is_outside, raising=False)
    assert likeness(model[0]) == likeness(model[1])
    report = kernels.patch(model)
    assert [r.name for r in report.replaced] == [[], ["1"]][at == 0]
    assert [r.name for r in report.refused] == [["0", "1"], ["0"]][at == 0]
    assert proofs == [model[1], model[0]][: 1 + (at == 0)]


def _keeps_what_is_outside(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    copied = self.__class__.__new__(self.__class__)
    memo[id(self)] = copied
    copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
    if self in OUTSIDE:
        OUTSIDE[copied] = OUTSIDE[self]
    return copied


def test_what_is_left_alone_is_shared_too(proofs: list[nn.Module]) -> None:
    model = nn.ModuleList(Scaled(number=2.0) for _ in range(3))
    with pytest.warns(UserWarning, match="computes something else"):
        report = kernels.patch(model)
    assert len(proofs) == 1
    assert [r.name for r in report.refused] == ["0", "1", "2"]


def test_of_equal_modules_each_is_checked_by_itself() -> None:
    """A hook on a copy of a proved module, and a parameter of a class of its own."""
    model = nn.ModuleList(mix_ffns.DenseMixFFN() for _ in range(4))
    hooked(model[2].dense1)
    weight: Any = model[0].dense1.weight
    model[0].dense1.weight = nn.Parameter(weight.detach().as_subclass(Marked))  # type: ignore[assignment]
    report = kernels.patch(model)
    assert [r.name for r in report.replaced] == ["1", "3"]
    assert [r.name for r in report.refused] == ["0", "2"]


class Marked(torch.Tensor):
    """A subclass."""


def test_objects_that_hold_themselves_are_told_apart() -> None:
    circles: list[Any] = []
    for _ in range(2):
        options = Options()
        options.factor = [options]
        circles.append(options)
    first, second = (likeness(Scaled(options=options)) for options in circles)
    assert first == likeness(Scaled(options=circles[0]))
    assert first != second


def test_no_proof_is_kept_from_one_call_to_the_next(proofs: list[nn.Module]) -> None:
    for _ in range(2):
        kernels.patch(Scaled())
    assert len(proofs) == 2
