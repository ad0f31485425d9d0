"""What a module holds, what its functions are and what it is called with: where one differs, its own forward runs."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.nn.utils import prune

import msformer_kernels as kernels
from tests.kernels.patching.models import blocks, mix_ffns

X, SIZE = torch.randn(2, 24, 8, generator=torch.Generator().manual_seed(0)), (6, 4)
IMAGE = X.transpose(1, 2).unflatten(2, SIZE).contiguous()


@dataclass
class Settings:
    factor: float = 1.0


class Holds(mix_ffns.DenseMixFFN):
    """Its output goes through what it holds."""

    kind_factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.row = [1.0]
        self.table = {"factors": [1.0]}
        self.settings = Settings()
        self._private = 1.0
        self.register_parameter("gamma", None)

    def forward(self, hidden_states: Tensor, height: int, width: int) -> Tensor:
        output = super().forward(hidden_states, height, width)
        output = output * self.row[0] * self.table["factors"][0] * self.settings.factor * self._private
        output = self.changed(output * self.kind_factor)
        after = getattr(self, "after", None)
        output = output if after is None else after(output)
        return output if self.gamma is None else output * self.gamma

    def changed(self, output: Tensor) -> Tensor:
        return output


class HoldsATensor(mix_ffns.DenseMixFFN):
    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.tensor(1.0)

    def forward(self, hidden_states: Tensor, height: int, width: int) -> Tensor:
        return super().forward(hidden_states, height, width) * self.factor


def own_convolution(m: Any) -> None:
    layer = m.dwconv.dwconv
    layer._conv_forward = types.MethodType(lambda self, x, w, b: 2 * nn.Conv2d._conv_forward(self, x, w, b), layer)


def sparse(m: Any) -> None:
    m.dense1.weight = nn.Parameter(m.dense1.weight.detach().to_sparse())


CHANGES: dict[str, Callable[[Any], Any]] = {
    "row": lambda m: m.row.__setitem__(0, 2.0),
    "another row": lambda m: setattr(m, "row", [2.0]),
    "inner row": lambda m: m.table["factors"].__setitem__(0, 2.0),
    "settings": lambda m: setattr(m.settings, "factor", 2.0),
    "private": lambda m: setattr(m, "_private", 2.0),
    "of the class": lambda m: setattr(m, "kind_factor", 2.0),
    "method": lambda m: setattr(m, "changed", torch.neg),
    "new function": lambda m: setattr(m, "after", torch.neg),
    "new parameter": lambda m: setattr(m, "gamma", nn.Parameter(torch.full((8,), 2.0))),
    "convolution": own_convolution,
    "forward inside": lambda m: setattr(m.dwconv, "forward", lambda x, height, width: x),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_what_it_holds_counts(name: str) -> None:
    check_change(name, lambda module: module)


@pytest.mark.parametrize("name", ["inner row", "new function", "convolution", "forward inside"])
def test_a_graph_that_was_compiled_before_notices(name: str) -> None:
    torch.compiler.reset()
    check_change(name, lambda module: torch.compile(module, fullgraph=True, backend="eager"))


def check_change(name: str, called: Callable[[nn.Module], Any]) -> None:
    module = Holds().eval()
    report, call = kernels.patch(module, min_gain=0), called(module)
    assert is_fused(module, X, *SIZE)
    with torch.no_grad():
        before = call(X, *SIZE)
        CHANGES[name](module)
        found = call(X, *SIZE)
        report.undo()
        expected = module(X, *SIZE)
    assert not torch.allclose(before, expected, atol=1e-4)
    torch.testing.assert_close(found, expected)


def test_a_tensor_that_is_no_parameter_is_not_followed() -> None:
    with pytest.warns(UserWarning, match="factor is a Tensor, whose changes would not be seen"):
        kernels.patch(HoldsATensor().eval(), min_gain=0)


def test_sparse_weights_are_called() -> None:
    module = mix_ffns.DenseMixFFN().eval()
    kernels.patch(module, min_gain=0)
    expected = module(X, *SIZE)
    sparse(module)
    torch.testing.assert_close(module(X, *SIZE), expected)


def test_what_tools_keep_in_a_module_leaves_it_fused() -> None:
    module = mix_ffns.DenseMixFFN().eval()
    kernels.patch(module, min_gain=0)
    module._of_a_tool = object()  # type: ignore[assignment]
    module.compile(backend="eager")
    prune.random_unstructured(module.dense1, "weight", 0.5)
    prune.remove(module.dense1, "weight")
    assert is_fused(module, X, *SIZE)


def is_fused(module: nn.Module, *arguments: Any) -> bool:
    with torch.profiler.profile() as profile, torch.no_grad():
        module.forward(*arguments)
    return any(e.name == "msformer::mix_ffn" for e in profile.events())


@pytest.mark.parametrize("kind", [Holds, mix_ffns.DenseMixFFN, mix_ffns.DepthwiseConv, nn.Linear, nn.GELU])
def test_a_function_that_is_replaced_for_a_class_counts(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Holds().eval()
    report = kernels.patch(module, min_gain=0)
    assert is_fused(module, X, *SIZE)
    forward = kind.forward  # type: ignore[attr-defined]
    monkeypatch.setattr(kind, "forward", lambda self, *arguments: 2 * forward(self, *arguments))
    found = module(X, *SIZE)
    report.undo()
    assert torch.equal(found, module(X, *SIZE))


@pytest.fixture
def doubles_linear_layers() -> Iterator[None]:
    handle = modules.register_module_forward_hook(
        lambda module, given, output: 2 * output if isinstance(module, nn.Linear) else None
    )
    yield
    handle.remove()


def test_hooks_for_all_modules_run(doubles_linear_layers: None) -> None:
    """The proof calls none of them."""
    module = mix_ffns.DenseMixFFN().eval()
    report = kernels.patch(module, min_gain=0)
    assert len(report.replaced) == 1
    found = module(X, *SIZE)
    report.undo()
    assert torch.equal(found, module(X, *SIZE))


class Keeps(mix_ffns.DenseMixFFN):
    def forward(self, hidden_states: Tensor, height: int, width: int) -> Tensor:
        self.last = super().forward(hidden_states, height, width)
        return self.last


def test_what_a_forward_keeps_would_be_lost() -> None:
    with pytest.warns(UserWarning, match="its forward sets last, which would be lost"):
        kernels.patch(Keeps().eval(), min_gain=0)


class KeepsAClassToken(mix_ffns.DenseMixFFN):
    def forward(self, hidden_states: Tensor, height: int, width: int) -> Tensor:
        if hidden_states.shape[1] == height * width:
            return super().forward(hidden_states, height, width)
        return torch.cat((hidden_states[:, :1], super().forward(hidden_states[:, 1:], height, width)), 1)


class Casts(mix_ffns.DenseMixFFN):
    def forward(self, hidden_states: Tensor, height: int, width: int) -> Tensor:
        return super().forward(hidden_states.to(self.dense1.weight.dtype), height, width)


class StaysWide(mix_ffns.DenseMixFFN):
    def forward(self, hidden_states: Tensor, height: int, width: int) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(hidden_states.float(), height, width)


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (KeepsAClassToken, (torch.cat((X[:, :1], X), 1), *SIZE)),
        (Casts, (X.bfloat16(), *SIZE)),
        (lambda: Casts().bfloat16(), (X, *SIZE)),
        (mix_ffns.ImageMixFFN, (IMAGE[0],)),
    ],
    ids=["class token", "narrow tokens", "narrow weights", "one image"],
)
def test_what_was_not_proved_runs_as_it_is(make: Callable[[], Any], arguments: tuple[Any, ...]) -> None:
    module = make().eval()
    report = kernels.patch(module, min_gain=0)
    assert len(report.replaced) == 1
    found = module(*arguments)
    report.undo()
    assert torch.equal(found, module(*arguments))


def test_a_forward_that_leaves_autocast_keeps_its_dtype() -> None:
    module = StaysWide().eval()
    kernels.patch(module, min_gain=0)
    assert is_fused(module, X, *SIZE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(X, *SIZE).dtype == torch.float32


class Clips(mix_ffns.DenseMixFFN):
    def forward(self, hidden_states: Tensor, height: int, width: int) -> Tensor:
        found = super().forward(hidden_states, height, width)
        return found.clamp(-1, 1) if found.dtype == torch.float16 else found


def test_a_forward_that_asks_for_float16_runs_there() -> None:
    module = Clips().eval()
    kernels.patch(module, min_gain=0)
    assert is_fused(module, X, *SIZE)
    found = module.half()(100 * X.half(), *SIZE)
    assert found.abs().max() == 1


def test_norms_that_stay_in_float32() -> None:
    block = blocks.TupleBlock().eval()
    report = kernels.patch(block, min_gain=0)
    block.bfloat16()
    for norm in (block.layer_norm_1, block.layer_norm_2):
        norm.float()
    (found,) = block(X.bfloat16(), *SIZE)
    report.undo()
    torch.testing.assert_close(found, block(X.bfloat16(), *SIZE)[0], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_an_image_lies_in_memory_as_before(layout: torch.memory_format) -> None:
    """A model may take a view of it."""
    module, image = mix_ffns.ImageMixFFN().eval(), IMAGE.contiguous(memory_format=layout)
    expected = module(image)
    kernels.patch(module, min_gain=0)
    assert module(image).stride() == expected.stride()


def test_fx_traces_the_original() -> None:
    module = mix_ffns.ImageMixFFN().eval()
    expected = module(IMAGE)
    kernels.patch(module, min_gain=0)
    torch.testing.assert_close(torch.fx.symbolic_trace(module)(IMAGE), expected)


class NoSubclasses(nn.Module):
    def __init_subclass__(cls, last: bool = False) -> None:
        if not last:
            raise TypeError("no subclasses")


class Last(NoSubclasses, mix_ffns.DenseMixFFN, last=True):
    """Its class cannot have one that carries out a plan."""


def test_a_class_without_subclasses_is_left_alone() -> None:
    """And the others of the model are replaced."""
    model = nn.ModuleList([mix_ffns.DenseMixFFN(), Last()]).eval()
    report = kernels.patch(model, min_gain=0)
    assert [r.name for r in report.replaced] == ["0"]
    assert [(r.name, r.reason) for r in report.refused] == [
        ("1", "a subclass of Last cannot be made (TypeError: no subclasses)")
    ]


def test_layers_without_a_shape_are_told() -> None:
    module = mix_ffns.DenseMixFFN()
    module.dense1 = nn.LazyLinear(16)
    with pytest.warns(UserWarning, match="patch it after a first call"):
        kernels.patch(module)
    module(X, *SIZE)
    assert len(kernels.patch(module, min_gain=0).replaced) == 1


def test_only_takes_any_name_of_a_shared_module() -> None:
    model = nn.ModuleDict({"first": mix_ffns.DenseMixFFN()})
    model["second"] = model["first"]
    assert [r.name for r in kernels.patch(model, only=["second"]).replaced] == ["first"]
    copied = copy.deepcopy(model)
    assert copied["first"] is copied["second"]
    assert is_fused(copied["second"], X, *SIZE)


def test_a_function_of_an_inner_class_is_compared_by_itself() -> None:
    module = mix_ffns.DenseMixFFN().eval()
    module.intermediate_act_fn = Activation()
    kernels.patch(module, min_gain=0)
    assert is_fused(module, X, *SIZE)
    module.intermediate_act_fn.function = F.relu
    assert not is_fused(module, X, *SIZE)


class Activation(nn.Module):
    function = staticmethod(F.gelu)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)
