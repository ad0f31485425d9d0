"""Inverted residuals: BatchNorm with running statistics is folded in evaluation mode, and only there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import msformer_kernels as kernels
from tests.kernels.patching.models.blocks import TupleBlock
from tests.kernels.patching.models.mix_ffns import DenseMixFFN, DropPath
from tests.kernels.patching.test_structures import operators_called

X = torch.randn(2, 8, 6, 4, generator=torch.Generator().manual_seed(0))
FUSED = ["msformer::mix_ffn"]


class InvertedResidual(nn.Module):
    """MobileNetV2's; its settings are what others vary."""

    def __init__(
        self,
        norms: tuple[Callable[[int], nn.Module], ...] = (nn.BatchNorm2d,) * 3,
        act: Callable[[], nn.Module] = nn.ReLU6,
        bias: bool = False,
        stride: int = 1,
        outputs: int = 8,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(8, 16, 1, bias=bias), norms[0](16), act()
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, stride, 1, groups=16, bias=bias), norms[1](16)
        self.act2, self.gate = act(), nn.Identity()
        self.conv3, self.bn3 = nn.Conv2d(16, outputs, 1, bias=bias), norms[2](outputs)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act2(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))
        return x + self.drop_path(self.bn3(self.conv3(self.gate(hidden))))


class NormAct(nn.BatchNorm2d):
    """timm's: dropout and activation inside the BatchNorm."""

    def __init__(self, channels: int, act: type[nn.Module] = nn.SiLU) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class Wrapped(nn.Module):
    """A part of a network, with the statistics of a few batches."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


NONE: Any = lambda channels: nn.Identity()  # noqa: E731
PLAIN = partial(nn.BatchNorm2d, affine=False)
FORMS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "mobilenet": (InvertedResidual, "relu6, relu6 before the convolution, adds x, bn1, bn2, bn3 folded"),
    "synchronized": (
        lambda: InvertedResidual((nn.SyncBatchNorm,) * 3, nn.ReLU),
        "relu, relu before the convolution, adds x, bn1, bn2, bn3 folded",
    ),
    "activation inside": (
        lambda: InvertedResidual((NormAct, NormAct, partial(NormAct, act=nn.Identity)), nn.Identity),
        "silu, silu before the convolution, adds x, bn1, bn2, bn3 folded",
    ),
    "efficientvit": (
        lambda: InvertedResidual((NONE, NONE, nn.BatchNorm2d), nn.Hardswish, bias=True),
        "hardswish, hardswish before the convolution, adds x, bn3 folded",
    ),
    "not affine": (
        lambda: InvertedResidual((PLAIN, PLAIN, PLAIN), nn.GELU, bias=True),
        "gelu, gelu before the convolution, adds x, bn1, bn2, bn3 folded",
    ),
}


def made(make: Callable[[], nn.Module] = InvertedResidual, dtype: torch.dtype = torch.float64) -> nn.Module:
    """In evaluation mode, with parameters and statistics that are not those of a new module."""
    torch.manual_seed(0)
    model = make().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


def results(model: nn.Module, x: Tensor = X) -> list[Tensor]:
    """Output and gradients of input and parameters."""
    x = x.to(next(model.parameters()).dtype, copy=True).requires_grad_()
    output = model(x)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), [x, *model.parameters()])]


def assert_same(model: nn.Module, original: nn.Module) -> None:
    for found, expected in zip(results(model), results(original), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


def operators(model: nn.Module) -> list[str]:
    return operators_called(model.float(), ())


@pytest.mark.parametrize("name", FORMS)
def test_batch_norms_are_folded_in_evaluation_mode(name: str) -> None:
    make, options = FORMS[name]
    model = made(make)
    original = copy.deepcopy(model)
    (replaced,) = kernels.patch(model, min_gain=0).replaced
    assert (replaced.by, replaced.options) == ("mix_ffn", options)
    assert replaced.note == "its own forward in training, where BatchNorm uses the statistics of the batch"
    assert_same(model, original)
    if name != "synchronized":  # those take statistics on a GPU only
        assert_same(model.train(), original.train())
        for found, expected in zip(model.buffers(), original.buffers(), strict=True):
            assert torch.equal(found, expected)
        assert operators(model) == []
    assert operators(model.eval()) == FUSED


class WithoutMean(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, torch.zeros_like(self.running_mean), self.running_var, self.weight, self.bias)  # type: ignore[arg-type]


class Excited(InvertedResidual):
    def __init__(self) -> None:
        super().__init__()
        pooled = nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 1), nn.Sigmoid()
        self.gate = nn.Sequential(*pooled)  # type: ignore[assignment]


class NormAfterActivation(InvertedResidual):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.bn2(self.act2(self.conv2(self.bn1(self.act1(self.conv1(x))))))
        return x + self.bn3(self.conv3(hidden))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (partial(InvertedResidual, (partial(nn.BatchNorm2d, track_running_stats=False),) * 3), "bn1 has no running"),
        (partial(InvertedResidual, (WithoutMean,) * 3), "computes something else"),
        (partial(InvertedResidual, (nn.InstanceNorm2d, nn.BatchNorm2d, nn.BatchNorm2d)), "bn1 has a buffer"),
        (partial(InvertedResidual, act=partial(nn.Hardtanh, 0.0, 7.0)), "computes something else"),
        (partial(InvertedResidual, stride=2), r"stride \(2, 2\)"),
        (partial(InvertedResidual, outputs=5), "output features differ from its input features"),
        (Excited, r"has 4 \(conv1, gate.1, gate.3, conv3\)"),
        (NormAfterActivation, "computes something else"),
    ],
)
def test_what_is_no_foldable_batch_norm_is_left_alone(make: Callable[[], nn.Module], reason: str) -> None:
    model = make()  # whose statistics are 0 and 1, and prove nothing
    with pytest.warns(UserWarning, match=reason):
        assert kernels.patch(model, min_gain=0).replaced == []


def test_without_an_example_they_are_left_alone() -> None:
    with pytest.warns(UserWarning, match="does not gain at every size; give `example`"):
        kernels.patch(made())


class TokenFFN(DenseMixFFN):
    """Of tokens, with a BatchNorm after the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.dwconv.dwconv = nn.Sequential(self.dwconv.dwconv, nn.BatchNorm2d(16))  # type: ignore[assignment]


def test_a_block_around_one() -> None:
    block = made(TupleBlock)
    block.mlp = made(TokenFFN)
    original, tokens = copy.deepcopy(block), (X.double().flatten(2).mT, 6, 4)
    report = kernels.patch(block, min_gain=0)
    assert [r.by for r in report.replaced] == ["block with mix_ffn", "mix_ffn"]
    assert report.replaced[0].note == "its own forward in training, where BatchNorm uses the statistics of the batch"
    for training in (False, True):
        torch.testing.assert_close(block.train(training)(*tokens), original.train(training)(*tokens))
        for found, expected in zip(block.buffers(), original.buffers(), strict=True):
            assert torch.equal(found, expected)


class Clamped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(0, 6)


@pytest.mark.parametrize("norms", [(nn.BatchNorm2d,) * 3, (NONE, NONE, nn.BatchNorm2d)], ids=["norms", "one"])
def test_the_probes_tell_relu6_from_relu(norms: Any) -> None:
    """By numbers alone: no name of an activation is there."""
    report = kernels.patch(made(partial(InvertedResidual, norms, Clamped)), min_gain=0)
    assert report.replaced[0].options.startswith("relu6, relu6 before the convolution")


def test_parameters_and_statistics_are_taken_as_they_are() -> None:
    model = made()
    original, other = copy.deepcopy(model), made(lambda: InvertedResidual(bias=False))
    kernels.patch(model, min_gain=0)
    results(model)

    def trained(m: nn.Module) -> None:
        optimizer = torch.optim.SGD(m.parameters(), 0.01)
        m(X.double()).square().mean().backward()
        optimizer.step()

    def averaged(m: Any) -> None:
        m.bn1.running_mean.mul_(0.9).add_(0.3)
        m.bn2.running_var.add_(1)

    def loaded(m: nn.Module) -> None:
        m.load_state_dict({name: t * 2 for name, t in other.state_dict().items()})

    def passed(m: nn.Module) -> None:
        m.train()(X.double())
        m.eval()

    before = results(model)[0]
    for change in (trained, averaged, loaded, passed):
        change(model)
        change(original)
        assert not torch.equal(results(model)[0], before)
        assert_same(model, original)
        before = results(model)[0]
    assert operators(model) == FUSED


def trains(m: Any) -> None:
    m.bn2.train()


def without_statistics(m: Any) -> None:
    m.bn2.running_mean = m.bn2.running_var = None


def other_eps(m: Any) -> None:
    m.bn2.eps = 0.5


def hook(m: Any) -> None:
    m.bn2.register_forward_hook(lambda module, given, output: 2 * output)


def replaced(m: Any) -> None:
    m.bn2 = nn.Identity()


def synchronized(m: Any) -> None:
    nn.SyncBatchNorm.convert_sync_batchnorm(m)


def not_tracked(m: Any) -> None:
    m.bn2.track_running_stats = False  # in evaluation mode the statistics are used all the same


def momentum(m: Any) -> None:
    m.bn2.momentum = 0.5


def frozen(m: Any) -> None:
    m.train()
    for child in (m.bn1, m.bn2, m.bn3):
        child.eval()


CHANGES: dict[Callable[[Any], None], bool] = {
    change: change in (not_tracked, momentum, frozen)
    for change in (
        trains,
        without_statistics,
        other_eps,
        hook,
        replaced,
        synchronized,
        not_tracked,
        momentum,
        frozen,
    )
}
"""And whether the operator still runs."""


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_a_batch_norm_counts(change: Callable[[Any], None]) -> None:
    model = Wrapped(made())
    original = copy.deepcopy(model)
    kernels.patch(model, min_gain=0)
    change(model.block)
    change(original.block)
    assert_same(model, original)
    for found, expected in zip(model.buffers(), original.buffers(), strict=True):
        assert torch.equal(found, expected)
    assert operators(model) == (FUSED if CHANGES[change] else [])


def test_frozen_batch_norms_beside_dropped_paths() -> None:
    model = made(partial(InvertedResidual, drop_path=0.5))
    row = kernels.patch(model, min_gain=0).replaced[0]
    assert row.note == "its own forward in training, where BatchNorm uses the statistics of the batch"
    assert "called" in row.options
    frozen(model)
    assert operators(model) == FUSED
    assert operators(model.eval()) == FUSED


def test_a_convolution_that_was_fused_before() -> None:
    model: Any = made()
    original = copy.deepcopy(model)
    for i in "123":
        convolution = fuse_conv_bn_eval(getattr(model, f"conv{i}"), getattr(model, f"bn{i}"))
        setattr(model, f"conv{i}", convolution)
        setattr(model, f"bn{i}", nn.Identity())
    kernels.patch(model, min_gain=0)
    with torch.no_grad():
        torch.testing.assert_close(model(X.double()), original(X.double()))
    assert operators(model.train()) == FUSED


def test_compile_has_one_graph() -> None:
    torch.compiler.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph

    model = made()
    original = copy.deepcopy(model)
    kernels.patch(model, min_gain=0)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert_same(compiled, original)
    assert "msformer" in graphs[0].code
    for change in (trains, other_eps, nn.Module.train):
        change(model)
        change(original)
        assert_same(compiled, original)
        assert "msformer" not in graphs[-1].code
        model.eval()
        original.eval()


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16"])
def test_half_precision_rounds_no_more_than_the_original(autocast: bool) -> None:
    image = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = made(dtype=torch.float64)
    model = copy.deepcopy(exact).to(torch.float32 if autocast else torch.bfloat16)
    with torch.no_grad():
        for wide, narrow in zip(exact.parameters(), model.parameters(), strict=True):
            wide.copy_(narrow)
        for wide, narrow in zip(exact.buffers(), model.buffers(), strict=True):
            wide.copy_(narrow)
    errors = []
    for patched in (False, True):
        if patched:
            kernels.patch(model, min_gain=0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = results(model, image)
        expected = results(exact, image)
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)])
    assert operators(model) == FUSED
    for ours, theirs in zip(errors[1], errors[0], strict=True):
        assert ours <= 1.25 * theirs
