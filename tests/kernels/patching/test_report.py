"""Which modules are looked at, what the report says, and undo."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import msformer_kernels as kernels
from msformer_kernels.patching import Refusal, Replacement, Report
from tests.kernels.patching.models import blocks, mix_ffns


def names(report: Report) -> list[str]:
    return [row.name for row in report.replaced]


def many() -> nn.Module:
    return nn.ModuleList(mix_ffns.DenseMixFFN() for _ in range(11))


def is_patched(module: nn.Module) -> bool:
    return type(module).__mro__[1] is mix_ffns.DenseMixFFN


@pytest.mark.parametrize("only", [["1"], "1", lambda name, module: name == "1" and isinstance(module, nn.Module)])
def test_only_takes_full_names_or_a_function(only: object) -> None:
    model = many()
    assert names(kernels.patch(model, only=only)) == ["1"]  # type: ignore[arg-type]
    assert [is_patched(m) for m in model.children()] == [i == 1 for i in range(11)]


def test_a_name_that_is_not_there_is_an_error() -> None:
    model = many()
    with pytest.raises(ValueError, match="only: the model has no module '12'"):
        kernels.patch(model, only=["1", "12"])
    assert not any(is_patched(m) for m in model.children())


def test_dry_run_reports_and_changes_nothing() -> None:
    model, twin = nn.Sequential(blocks.TupleBlock(), mix_ffns.LongerMixFFN()), nn.Sequential(blocks.TupleBlock())
    dry, wet = kernels.patch(model, dry_run=True), kernels.patch(twin)
    assert names(dry) == names(wet) == ["0", "0.mlp"]
    assert [r.name for r in dry.refused] == ["1"]
    assert type(model[0]) is blocks.TupleBlock
    assert type(model[0].mlp) is mix_ffns.DenseMixFFN
    assert str(dry).startswith("would be replaced: 2")
    dry.undo()


def test_rows_are_in_the_order_of_the_model() -> None:
    assert names(kernels.patch(many())) == [str(i) for i in range(11)]


def test_the_report_prints_as_a_table() -> None:
    report = Report(
        [Replacement("layer", "MLP", "mix_ffn", "gelu", 2.2e-15, "1.5 x"), Replacement("", "M", "b", "", 1e-15)],
        [Refusal(f"other.{i}", "Gated", "it is gated") for i in range(5)] + [Refusal("", "Model", "other")],
    )
    assert str(report).splitlines() == [
        "replaced: 2",
        "  module       class  by       options  error",
        "  layer        MLP    mix_ffn  gelu     2e-15  1.5 x",
        "  (the model)  M      b                 1e-15",
        "left alone: 6",
        "  Gated: other.0, other.1, other.2 and 2 more: it is gated",
        "  Model: (the model): other",
    ]


def test_undo_puts_the_classes_back_once() -> None:
    model = nn.Sequential(blocks.TupleBlock(), mix_ffns.DenseMixFFN())
    classes = [type(m) for m in model.modules()]
    report = kernels.patch(model)
    assert [type(m) for m in model.modules()] != classes
    report.undo()
    assert [type(m) for m in model.modules()] == classes
    kernels.patch(model)
    report.undo()  # does not undo another patch
    assert [type(m) for m in model.modules()] != classes


def test_as_a_context_manager_it_is_undone_also_after_an_error() -> None:
    model = mix_ffns.DenseMixFFN()
    patched = []

    def fail() -> None:
        with kernels.patch(model) as report:
            patched.append((is_patched(model), names(report)))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert patched == [(True, [""])]
    assert type(model) is mix_ffns.DenseMixFFN


def test_undo_of_a_class_that_changed_since_changes_nothing() -> None:
    model = nn.Sequential(mix_ffns.DenseMixFFN(), mix_ffns.DenseMixFFN())
    report = kernels.patch(model)
    other = type("Other", (type(model[1]),), {})
    model[1].__class__ = other
    with pytest.raises(RuntimeError, match=r"undo: 1 is a Other now: something changed its class"):
        report.undo()
    assert is_patched(model[0])
    assert type(model[1]) is other


def test_a_second_patch_finds_the_first() -> None:
    model = blocks.TupleBlock()
    first = kernels.patch(model, only=["mlp"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = kernels.patch(model)
        assert kernels.patch(model).replaced == []
    assert names(second) == [""]
    second.undo()
    first.undo()
    assert type(model) is blocks.TupleBlock
    assert type(model.mlp) is mix_ffns.DenseMixFFN


def test_another_patch_of_the_module_is_refused() -> None:
    model = mix_ffns.DenseMixFFN()
    original = model.forward
    model.forward = lambda *args: 2 * original(*args)  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="another patch: a forward of its own"):
        kernels.patch(model)
    assert type(model) is mix_ffns.DenseMixFFN


def test_a_class_that_pickles_in_its_own_way_is_refused() -> None:
    class Own(mix_ffns.DenseMixFFN):
        def __reduce__(self) -> tuple[object, ...]:
            return Own, ()

    with pytest.warns(UserWarning, match="Own is pickled in a way of its own"):
        kernels.patch(Own())


def test_nothing_replaced_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="nothing was replaced in Linear: no module looks like one"):
        kernels.patch(nn.Linear(2, 2))


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got function"):
        kernels.patch(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="example: expected a tuple of the arguments of a call, got Tensor"):
        kernels.patch(mix_ffns.ImageMixFFN(), example=torch.ones(1))  # type: ignore[arg-type]


def test_only_the_innermost_module_is_named() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mix_ffns.LongerMixFFN()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.inner(x)

    with pytest.warns(UserWarning, match="nothing"):
        assert [r.name for r in kernels.patch(Outer()).refused] == ["inner"]
