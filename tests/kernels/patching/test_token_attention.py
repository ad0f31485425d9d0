"""Linear attention of ReLU features on tokens, as SANA's transformer has it in diffusers: a processor does the work."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import msformer_kernels as kernels
from tests.kernels.patching.models import relu_attentions

X = torch.randn(2, 24, 8, generator=torch.Generator().manual_seed(0))


class Scaled(relu_attentions.TokenProcessor):
    """Has a number of its own, and the forward of its base class."""

    def __init__(self, scale: Any = 1.0) -> None:
        self.scale = scale

    def features(self, x: Tensor) -> Tensor:
        return super().features(x) if self.scale == 1.0 else super().features(x - 1).square() * self.scale


class ModuleProcessor(nn.Module):
    """With parameters, as adapters have."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(8))

    def forward(self, attn: relu_attentions.TokenAttention, x: Tensor, **named: Any) -> Tensor:
        return relu_attentions.TokenProcessor()(attn, x, **named) + self.shift


def results(model: nn.Module, *given: Any, **named: Any) -> list[Tensor]:
    """Output and gradients."""
    x = given[0].clone().requires_grad_()
    output = model(x, *given[1:], **named)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), [x, *model.parameters()])]


def operators(model: nn.Module, *given: Any, **named: Any) -> int:
    with torch.profiler.profile() as profile, torch.no_grad():
        model(*given, **named)
    return sum(e.name == "msformer::efficient_attention" for e in profile.events())


def pair(
    processor: object = None, norm: bool = False
) -> tuple[relu_attentions.TokenAttention, relu_attentions.TokenAttention]:
    """A patched module and one like it that is not."""
    torch.manual_seed(0)
    original = relu_attentions.TokenAttention(processor, norm).eval()
    patched = copy.deepcopy(original)
    assert [r.by for r in kernels.patch(patched, min_gain=0).replaced] == ["efficient_attention"]
    return patched, original


@pytest.mark.parametrize("norm", [False, True])
def test_output_and_gradients_are_those_of_the_original(norm: bool) -> None:
    patched, original = pair(norm=norm)
    for found, expected in zip(results(patched, X), results(original, X), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert operators(patched, X) == 1


CHANGES: dict[str, Callable[[relu_attentions.TokenAttention], object]] = {
    "ordinary attention": lambda m: m.set_processor(relu_attentions.SoftmaxProcessor()),
    "of a class below": lambda m: m.set_processor(Scaled(3.0)),
    "a module": lambda m: m.set_processor(ModuleProcessor()),
    "a function": lambda m: m.set_processor(lambda attn, x, **named: x + 1),
    "heads": lambda m: setattr(m, "heads", 4),
    "a norm": lambda m: (setattr(m, "norm_q", nn.RMSNorm(8)), setattr(m, "norm_k", nn.RMSNorm(8))),
    "dropout": lambda m: m.to_out.__setitem__(1, nn.Tanh()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_after_a_change_its_own_forward_runs(name: str) -> None:
    patched, original = pair()
    before = original(X)
    for m in (patched, original):
        torch.manual_seed(1)
        CHANGES[name](m)
    assert not torch.allclose(original(X), before)
    if name != "dropout":  # what comes after the attention is called, so it may change
        assert operators(patched, X) == 0
    torch.testing.assert_close(patched(X), original(X))


def test_a_setting_of_the_processor_is_watched() -> None:
    patched, original = pair(Scaled())
    assert operators(patched, X) == 1
    for m in (patched, original):
        m.processor.scale = 2.0
    assert torch.equal(patched(X), original(X))


def test_a_replaced_call_of_the_processors_class_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    patched, _ = pair()
    monkeypatch.setattr(relu_attentions.TokenProcessor, "__call__", lambda self, attn, x, **named: x + 1)
    assert torch.equal(patched(X), X + 1)


def test_a_processor_that_holds_more_than_numbers_is_left_alone() -> None:
    model = relu_attentions.TokenAttention(Scaled(torch.tensor(1.0)))
    with pytest.warns(UserWarning, match="processor holds a Tensor, whose changes would not be seen"):
        kernels.patch(model, min_gain=0)


@pytest.mark.parametrize("named", [{"context": X[:, :5]}, {"mask": torch.ones(2, 24)}, {"context": X}])
def test_keys_of_a_text_and_masks_run_its_own_forward(named: dict[str, Tensor]) -> None:
    patched, original = pair()
    assert operators(patched, X, **named) == 0
    assert torch.equal(patched(X, **named), original(X, **named))


def test_unknown_keywords_raise_as_they_did() -> None:
    patched, _ = pair()
    with pytest.raises(TypeError, match="no_such"):
        patched(X, no_such=1)


def test_float16_runs_its_own_forward_which_clips() -> None:
    patched, original = (m.half() for m in pair())
    with torch.no_grad():
        for m in (patched, original):
            m.to_out[0].bias.fill_(60000)
            m.to_out[0].weight.fill_(30000)
        found, expected = patched(X.half()), original(X.half())
    assert expected.abs().max() == 65504
    assert torch.equal(found, expected)


def test_copies_and_pickles_keep_the_patch() -> None:
    patched, _ = pair()
    for copied in (copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))):
        assert operators(copied, X) == 1
        copied.set_processor(relu_attentions.SoftmaxProcessor())
        assert operators(copied, X) == 0


def test_it_compiles_as_one_graph() -> None:
    patched, original = pair(Scaled())
    torch.compiler.reset()  # of other tests, whose modules share a forward
    compiled = torch.compile(patched, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), original(X), atol=1e-5, rtol=1e-4)
    patched.set_processor(relu_attentions.SoftmaxProcessor())
    original.set_processor(relu_attentions.SoftmaxProcessor())
    torch.testing.assert_close(compiled(X), original(X), atol=1e-5, rtol=1e-4)
