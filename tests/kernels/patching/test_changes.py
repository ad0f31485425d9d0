"""An inner layer that is wrapped, hooked, replaced or set differently is never passed over: the original forward runs.

Each change is made after the patch, and before it; what the changed original computes is what must come out.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import msformer_kernels as kernels
from tests.kernels.patching.models import attentions, blocks, mix_ffns, relu_attentions

X, SIZE = torch.randn(2, 24, 8, generator=torch.Generator().manual_seed(0)), (6, 4)


class Adapter(nn.Module):
    """Low rank, with the weight and bias of the layer it wraps."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Negated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x


class Marked(torch.Tensor):
    """A subclass, as quantized and distributed parameters are."""


def wrap(m: Any) -> None:
    m.mlp.dense1 = Adapter(m.mlp.dense1)


def subclass(m: Any) -> None:
    m.mlp.dense1.__class__ = Doubled


def hook(m: Any) -> None:
    m.mlp.dense2.register_forward_hook(lambda module, given, output: 2 * output)


def pre_hook(m: Any) -> None:
    m.mlp.dense1.register_forward_pre_hook(lambda module, given: (2 * given[0],))


def hook_on_a_wrapper(m: Any) -> None:
    m.mlp.dwconv.register_forward_hook(lambda module, given, output: 2 * output)


def hook_on_an_activation(m: Any) -> None:
    m.mlp.intermediate_act_fn.register_forward_hook(lambda module, given, output: 2 * output)


def backward_hook(m: Any) -> None:
    m.mlp.dense2.register_full_backward_hook(lambda module, given, grads: (2 * given[0],))


def backward_pre_hook(m: Any) -> None:
    m.mlp.dense2.register_full_backward_pre_hook(lambda module, grads: (2 * grads[0],))


def own_forward(m: Any) -> None:
    original = m.mlp.dense2.forward
    m.mlp.dense2.forward = lambda x: 2 * original(x)


def activation(m: Any) -> None:
    m.mlp.intermediate_act_fn = nn.Tanh()


def approximate(m: Any) -> None:
    m.mlp.intermediate_act_fn.approximate = "tanh"


def circular(m: Any) -> None:
    m.mlp.dwconv.dwconv.padding_mode = "circular"


def norm(m: Any) -> None:
    m.layer_norm_2 = Negated()


def parametrized(m: Any) -> None:
    parametrize.register_parametrization(m.mlp.dense1, "weight", Negated())


def weight_norm(m: Any) -> None:
    parametrizations.weight_norm(m.mlp.dense1)
    with torch.no_grad():
        m.mlp.dense1.parametrizations.weight.original0.mul_(2)


def old_weight_norm(m: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(m.mlp.dense1)
    with torch.no_grad():
        m.mlp.dense1.weight_g.mul_(2)


def pruned(m: Any) -> None:
    prune.l1_unstructured(m.mlp.dense1, "weight", 0.5)


def dynamic_quantization(m: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, inplace=True)


def whole_feed_forward(m: Any) -> None:
    m.mlp.register_forward_hook(lambda module, given, output: 2 * output)


CHANGES: list[Callable[[Any], None]] = [
    wrap,
    subclass,
    hook,
    pre_hook,
    hook_on_a_wrapper,
    hook_on_an_activation,
    backward_hook,
    backward_pre_hook,
    own_forward,
    activation,
    approximate,
    circular,
    norm,
    parametrized,
    weight_norm,
    old_weight_norm,
    pruned,
    dynamic_quantization,
    whole_feed_forward,
]


def results(model: nn.Module) -> list[Tensor]:
    x = X.clone().requires_grad_()
    (output,) = model(x, *SIZE)
    return [output.detach(), *torch.autograd.grad(output.square().mean(), x)]


@pytest.fixture
def block() -> blocks.TupleBlock:
    torch.manual_seed(0)
    return blocks.TupleBlock().eval()


@pytest.mark.parametrize("after", [True, False], ids=["after", "before"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_change_of_an_inner_layer_counts(block: nn.Module, change: Callable[[Any], None], after: bool) -> None:
    before, changed, expected_model = results(block), copy.deepcopy(block), copy.deepcopy(block)
    torch.manual_seed(1)
    change(expected_model)
    expected = results(expected_model)
    if after:
        kernels.patch(changed, min_gain=0)
    torch.manual_seed(1)
    change(changed)
    if not after:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kernels.patch(changed, min_gain=0)
    found = results(changed)
    assert not all(torch.allclose(a, b, atol=3e-6, rtol=1e-5) for a, b in zip(before, expected, strict=True))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=3e-6, rtol=1e-5)


# a quantized layer has no parameters, so nothing looks like MixFFN; the others leave one that is
PLAIN = (norm, whole_feed_forward, approximate, dynamic_quantization)


@pytest.mark.parametrize("change", [c for c in CHANGES if c not in PLAIN], ids=lambda f: f.__name__)
def test_a_module_that_is_not_plain_is_reported(block: blocks.TupleBlock, change: Callable[[Any], None]) -> None:
    change(block)
    with pytest.warns(UserWarning, match="nothing was replaced"):
        report = kernels.patch(block, min_gain=0)
    assert [r.name for r in report.refused] == ["mlp"]


def test_a_tensor_subclass_is_not_taken(block: blocks.TupleBlock) -> None:
    weight = block.mlp.dense1.weight
    block.mlp.dense1.weight = nn.Parameter(weight.detach().as_subclass(Marked))  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="dense1 has a parameter that is a"):
        kernels.patch(block)


def test_a_layer_with_a_place_for_an_adapter_is_not_plain(block: blocks.TupleBlock) -> None:
    block.mlp.dense1.adapter = None  # type: ignore[assignment]
    block.mlp.dense1.__class__ = Doubled
    with pytest.warns(UserWarning, match="dense1 is a Doubled with adapter"):
        kernels.patch(block)


def test_a_shared_layer_is_watched_under_each_name() -> None:
    module = mix_ffns.ConvMixFFN().eval()
    report = kernels.patch(module)
    module.layers[5] = Negated()  # the same dropout as 3
    with torch.no_grad():
        found = module(X, SIZE)
        report.undo()
        torch.testing.assert_close(found, module(X, SIZE), atol=0, rtol=0)


def test_a_replaced_forward_of_the_class_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    module = mix_ffns.DenseMixFFN().eval()
    kernels.patch(module)
    monkeypatch.setattr(mix_ffns.DenseMixFFN, "forward", lambda self, x, height, width: x + 1)
    assert torch.equal(module(X, *SIZE), X + 1)


def test_settings_of_the_module_are_watched() -> None:
    module = attentions.LinearAttention().eval()
    image, report = torch.randn(2, 8, 6, 4), kernels.patch(module, min_gain=0)
    module.scale = 2.0
    with torch.no_grad():
        found = module(image)
        report.undo()
        assert torch.equal(found, module(image))


@pytest.mark.parametrize("make", [blocks.TupleBlock, blocks.EfficientBlock])
def test_layers_around_the_operator_are_called(make: Callable[[], Any]) -> None:
    """A hook on the norm before an attention that is called leaves the rest fused; of one that is fused it does not."""
    block, seen = make().eval(), []
    kernels.patch(block)
    norm = block.layer_norm_1 if make is blocks.TupleBlock else block.norm1
    norm.register_forward_hook(lambda *_: seen.append("norm"))
    with torch.profiler.profile() as profile, torch.no_grad():
        block(X, *SIZE)
    assert seen == ["norm"]
    assert any(e.name == "msformer::mix_ffn" for e in profile.events())


def test_dropout_of_hidden_features_keeps_the_original_in_training() -> None:
    """Also in evaluation mode, where a user turns the dropout alone on."""
    module = mix_ffns.DenseMixFFN(dropout=0.5)
    report = kernels.patch(module)
    assert "training" in report.replaced[0].note
    original = copy.deepcopy(module)
    original.__class__ = type(module).__mro__[1]
    for mode in ("train", "dropout alone", "eval"):
        for m in (module, original):
            m.train(mode == "train")
            if mode == "dropout alone":
                m.dropout.train()
        found, expected = [], []
        for m, outputs in ((module, found), (original, expected)):
            torch.manual_seed(3)
            outputs += [m(X, *SIZE), torch.rand(1)]
        assert torch.equal(found[1], expected[1])
        torch.testing.assert_close(found[0], expected[0])
        assert torch.equal(found[0], expected[0]) == (mode != "eval")


def test_dropout_that_is_turned_on_later_counts() -> None:
    module = mix_ffns.DenseMixFFN().train()
    kernels.patch(module)
    module.dropout.p = 1.0
    assert torch.equal(module(X, *SIZE), torch.zeros_like(X))


def test_a_layer_that_is_added_to_a_row_counts() -> None:
    module = mix_ffns.ConvMixFFN().eval()
    report = kernels.patch(module)
    module.layers.append(Negated())
    with torch.no_grad():
        found = module(X, SIZE)
        report.undo()
        assert torch.equal(found, module(X, SIZE))


class GivenActivation(mix_ffns.FlatMixFFN):
    """The activation is an attribute that is no module."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        del self.act
        self.act = activation  # type: ignore[assignment]


class Times:
    """An activation with a number."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, x: Tensor) -> Tensor:
        return self.factor * F.gelu(x)


class TimesAgain(Times):
    """With the call of its base class."""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (F.gelu, F.relu),
        (lambda x: F.gelu(x), lambda x: -F.gelu(x)),
        (partial(F.gelu, approximate="none"), partial(F.gelu, approximate="tanh")),
        (Times(1.0), Times(2.0)),
        (TimesAgain(1.0), TimesAgain(2.0)),
    ],
)
def test_functions_and_objects_that_a_module_holds_are_watched(before: Any, after: Any) -> None:
    """In a compiled graph as well."""
    module = GivenActivation(before).eval()
    report = kernels.patch(module)
    torch.compiler.reset()  # of other tests, whose modules share a forward
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    for call in (module, compiled):
        with torch.no_grad(), torch.profiler.profile() as profile:
            call(X, SIZE)
        assert any(e.name == "msformer::mix_ffn" for e in profile.events())
    module.act = after
    with torch.no_grad():
        found = [call(X, SIZE) for call in (module, compiled)]
        report.undo()
        for output in found:
            torch.testing.assert_close(output, module(X, SIZE), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("held", [partial(F.gelu, approximate=str), partial(F.gelu, X)])
def test_what_holds_more_than_numbers_and_names_is_not_followed(held: Any) -> None:
    module = mix_ffns.FlatMixFFN()
    module.unused = held
    if held.args:
        with pytest.warns(UserWarning, match="unused holds a Tensor, whose changes would not be seen"):
            kernels.patch(module)
    else:
        assert len(kernels.patch(module).replaced) == 1


def test_a_bound_method_is_not_followed() -> None:
    module = mix_ffns.FlatMixFFN()
    module.unused = nn.Linear(1, 1).forward  # type: ignore[assignment]
    with pytest.warns(UserWarning, match="unused is a method, which may hold anything"):
        kernels.patch(module)


def test_arguments_by_name_and_optional_ones(block: blocks.TupleBlock) -> None:
    kernels.patch(block)
    (expected,) = block(X, *SIZE)
    assert torch.equal(block(x=X, width=4, height=6)[0], expected)
    assert torch.equal(block(X, 6, 4, False)[0], expected)
    assert torch.equal(block(X, 6, width=4, output_attentions=False)[0], expected)
    assert len(block(X, 6, 4, output_attentions=True)) == 2
    assert len(block(X, 6, 4, True)) == 2
    with pytest.raises(TypeError):
        block(X, 6)
    with pytest.raises(TypeError):
        block(X, 6, 4, no_such=1)
    with pytest.raises(TypeError):
        block(X, 6, 4, height=6)


@pytest.mark.parametrize("make", [blocks.KeywordBlock, blocks.DeafBlock])
def test_keywords_go_where_they_went(make: type[nn.Module], caplog: pytest.LogCaptureFixture) -> None:
    """To the attention, or nowhere; those that the proof does not know go to the original forward."""
    block = make().eval()
    calls = [{}, {"output_attentions": True}, {"output_hidden_states": True}, {"other": True}]
    expected = [block(X, *SIZE, **named) for named in calls]
    kernels.patch(block)
    with caplog.at_level(logging.DEBUG, "msformer_kernels.patch"):
        for named, output in zip(calls, expected, strict=True):
            torch.testing.assert_close(block(X, *SIZE, **named), output, atol=3e-6, rtol=1e-5)
    refused = [message for message in caplog.messages if message.startswith(make.__name__)]
    assert len(refused) == (1 if make is blocks.KeywordBlock else 3)


def test_the_reason_is_logged(block: blocks.TupleBlock, caplog: pytest.LogCaptureFixture) -> None:
    kernels.patch(block)
    block.mlp.dense1 = Adapter(block.mlp.dense1)  # type: ignore[assignment]
    with caplog.at_level(logging.DEBUG, "msformer_kernels.patch"):
        block(X, *SIZE)
    assert "TupleBlock runs its own forward: mlp.dense1 is a Adapter now" in caplog.messages


class DoublingProcessor(relu_attentions.Processor):
    def __call__(self, attn: relu_attentions.SplitMultiScaleAttention, x: Tensor) -> Tensor:
        return 2 * super().__call__(attn, x)


@pytest.mark.parametrize("name", ["processor", "nonlinearity", "eps"])
def test_a_changed_attention_runs_its_own_forward(name: str) -> None:
    """Also where it leaves the work to an object that is no module."""
    model, original = relu_attentions.SplitMultiScaleAttention(), relu_attentions.SplitMultiScaleAttention()
    original.load_state_dict(model.state_dict())
    kernels.patch(model, min_gain=0)
    x = torch.randn(1, 8, 5, 4)
    for m in (model, original):
        setattr(m, name, {"processor": DoublingProcessor(), "nonlinearity": Negated(), "eps": 3.0}[name])
    assert torch.equal(model(x), original(x))
