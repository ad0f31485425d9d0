"""What is found and proved in small modules of published structure, and what only looks like it."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import msformer_kernels as kernels
from tests.kernels.patching.models import attentions, blocks, images, mix_ffns, relu_attentions

HEIGHT, WIDTH, CHANNELS = 6, 4, 8
HW, SIZE, TOKENS = (HEIGHT, WIDTH), ((HEIGHT, WIDTH),), (None,)

OURS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], list[tuple[str, str, str]]]] = {
    "dense": (mix_ffns.DenseMixFFN, HW, [("", "mix_ffn", "gelu")]),
    "size": (mix_ffns.FlatMixFFN, SIZE, [("", "mix_ffn", "gelu")]),
    "inline": (mix_ffns.InlineMixFFN, HW, [("", "mix_ffn", "relu")]),
    "relu before": (
        lambda: mix_ffns.FlatMixFFN(extra_relu=True),
        SIZE,
        [("", "mix_ffn", "gelu, relu before the convolution")],
    ),
    "gated": (
        mix_ffns.GatedFFN,
        (),
        [("", "mix_ffn", "silu, silu before the convolution, gated")],
    ),
    "7x7": (mix_ffns.WideMixFFN, SIZE, [("", "mix_ffn", "gelu")]),
    "silu": (lambda: with_activation(nn.SiLU()), SIZE, [("", "mix_ffn", "silu")]),
    "convolutions": (mix_ffns.ConvMixFFN, SIZE, [("", "mix_ffn", "gelu, adds identity")]),
    "image": (mix_ffns.ImageMixFFN, (), [("", "mix_ffn", "gelu_tanh")]),
    "skip": (mix_ffns.MixFFNSkip, HW, [("", "mix_ffn", "gelu, skip, hidden norm norm1")]),
    "pre-norm": (mix_ffns.PreNormMixFFN, SIZE, [("", "mix_ffn", "gelu, norm norm, adds x")]),
    "attention": (attentions.EfficientAttention, (), [("", "efficient_self_attention", "2 heads")]),
    "uneven attention": (
        lambda: attentions.EfficientAttention(8, 4, 12, 2),
        (),
        [("", "efficient_self_attention", "2 heads")],
    ),
    "linear attention": (
        attentions.LinearAttention,
        (),
        [("", "efficient_self_attention", "2 heads, scale 0.5, memory mem_kv, rms norm norm.g, rms norm to_out.1.g")],
    ),
    "without memory": (
        lambda: attentions.LinearAttention(memory=0),
        (),
        [("", "efficient_self_attention", "2 heads, scale 0.5, rms norm norm.g, rms norm to_out.1.g")],
    ),
    "multi-scale attention": (
        relu_attentions.MultiScaleAttention,
        (),
        [("", "efficient_attention", "relu, 4 channels a head, 3 scales, eps 1e-05")],
    ),
    "one scale": (
        lambda: relu_attentions.MultiScaleAttention(scales=()),
        (),
        [("", "efficient_attention", "relu, 4 channels a head, 1 scales, eps 1e-05")],
    ),
    "split multi-scale attention": (
        relu_attentions.SplitMultiScaleAttention,
        (),
        [("", "efficient_attention", "relu, 4 channels a head, 2 scales, eps 1e-15, adds x")],
    ),
    "token attention": (
        relu_attentions.TokenAttention,
        TOKENS,
        [("", "efficient_attention", "relu, 2 heads, eps 1e-15")],
    ),
    "token attention with norms": (
        lambda: relu_attentions.TokenAttention(norm=True),
        TOKENS,
        [("", "efficient_attention", "relu, 2 heads, eps 1e-15, norm_q of the query, norm_k of the key")],
    ),
    "tuple block": (
        blocks.TupleBlock,
        HW,
        [("", "block with mix_ffn", "layer_norm_2 and residual in mlp"), ("mlp", "mix_ffn", "gelu")],
    ),
    "keyword block": (
        blocks.KeywordBlock,
        HW,
        [("", "block with mix_ffn", "layer_norm_2 and residual in mlp"), ("mlp", "mix_ffn", "gelu")],
    ),
    "image block": (
        blocks.ImageBlock,
        (),
        [("", "block with mix_ffn", "norm2 and residual in mlp"), ("mlp", "mix_ffn", "gelu")],
    ),
    "efficient block": (
        blocks.EfficientBlock,
        HW,
        [
            ("", "block with mix_ffn", "norm2 and residual in mlp, norm1 and residual in attn"),
            ("attn", "efficient_self_attention", "2 heads"),
            ("mlp", "mix_ffn", "gelu, skip, hidden norm norm1"),
        ],
    ),
    "identity block": (
        blocks.IdentityBlock,
        SIZE,
        [("", "block with mix_ffn", "norm2 and residual in ffn"), ("ffn", "mix_ffn", "gelu, adds identity")],
    ),
}


def call(model: nn.Module, size: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Outputs and gradients."""
    x = torch.randn(shape_for(size), generator=torch.Generator().manual_seed(3)).requires_grad_()
    output = model(x, *size)
    outputs = output if isinstance(output, tuple) else (output,)
    total = sum(y.square().mean() for y in outputs)
    assert isinstance(total, Tensor)
    inputs = [x, *model.parameters()]
    gradients = torch.autograd.grad(total, inputs, allow_unused=True)
    return (*outputs, *(torch.zeros_like(p) if g is None else g for g, p in zip(gradients, inputs, strict=True)))


def operators_called(model: nn.Module, size: tuple[Any, ...]) -> list[str]:
    with torch.profiler.profile() as profile, torch.no_grad():
        call_forward(model, size)
    return sorted({e.name for e in profile.events() if e.name.startswith("msformer::")})


def call_forward(model: nn.Module, size: tuple[Any, ...]) -> Any:
    return model(torch.randn(shape_for(size)), *size)


def shape_for(size: tuple[Any, ...]) -> tuple[int, ...]:
    """Tokens where the size is an argument, else an image; of `CHANNELS`."""
    return (2, HEIGHT * WIDTH, CHANNELS) if size else (2, CHANNELS, HEIGHT, WIDTH)


@pytest.mark.parametrize("name", OURS)
def test_published_structures_are_replaced_and_compute_the_same(name: str) -> None:
    make, size, expected = OURS[name]
    torch.manual_seed(0)
    model = make()
    before = call(model, size)
    report = kernels.patch(model, min_gain=0)
    assert [(r.name, r.by, r.options) for r in report.replaced] == expected
    assert report.refused == []
    assert all(0 < r.error < 1e-12 for r in report.replaced)
    for training in (True, False):
        model.train(training)
        for found, exact in zip(call(model, size), before, strict=True):
            torch.testing.assert_close(found, exact, atol=2e-5, rtol=2e-5)
        assert {f"msformer::{by.removeprefix('block with ')}" for _, by, _ in expected} & set(
            operators_called(model, size)
        )
    report.undo()
    assert operators_called(model, size) == []
    assert all(torch.equal(a, b) for a, b in zip(call(model, size), before, strict=True))


NOT_OURS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "tanh before": (lambda: with_activation_before(nn.Tanh()), r"computes something else: mix_ffn .* differs by"),
    "MambaOut": (
        mix_ffns.PartlyMixedFFN,
        "mixes 6 of the 32 channels that its first layer gives, as in MambaOut; only",
    ),
    "gate of a norm": (mix_ffns.NormedGateFFN, "computes something else: mix_ffn .*gated"),
    "longer": (mix_ffns.LongerMixFFN, r"has 3 \(net.0, net.2, net.4\)"),
    "9x9": (lambda: mix_ffns.WideMixFFN(9), r"convolution is \(9, 9\), .*; only 3x3, 5x5, 7x7 with stride 1"),
    "elu": (lambda: with_activation(nn.ELU()), "computes something else"),
    "wide MambaOut": (
        lambda: mix_ffns.PartlyMixedFFN(8, 24, 8),
        "mixes 8 of the 48 channels that its first layer gives, as in MambaOut; only",
    ),
    "other width": (lambda: with_last(nn.Linear(16, 5)), "output features differ"),
    "circular": (
        lambda: with_convolution(nn.Conv2d(16, 16, 3, 1, 1, groups=16, padding_mode="circular")),
        "circular; only",
    ),
    "stride": (lambda: with_convolution(nn.Conv2d(16, 16, 3, 2, 1, groups=16)), r"stride \(2, 2\)"),
    "own parameter": (lambda: with_own(nn.Parameter(torch.ones(8))), "parameters of its own"),
    "buffer": (lambda: with_own(None), "buffer: own"),
}


def with_activation_before(activation: nn.Module) -> nn.Module:
    model = mix_ffns.FlatMixFFN(extra_relu=True)
    model.relu = activation
    return model


def with_activation(activation: nn.Module) -> nn.Module:
    model = mix_ffns.FlatMixFFN()
    model.act = activation  # type: ignore[assignment]
    return model


def with_last(layer: nn.Linear) -> nn.Module:
    model = mix_ffns.FlatMixFFN()
    model.fc2 = layer
    return model


def with_convolution(layer: nn.Conv2d) -> nn.Module:
    model = mix_ffns.FlatMixFFN()
    model.dwconv = layer
    return model


def with_own(parameter: nn.Parameter | None) -> nn.Module:
    model = mix_ffns.FlatMixFFN()
    if parameter is None:
        model.register_buffer("own", torch.ones(8))
    else:
        model.own = parameter
    return model


@pytest.mark.parametrize("name", NOT_OURS)
def test_what_only_looks_alike_is_left_alone_and_the_reason_is_said(name: str) -> None:
    make, reason = NOT_OURS[name]
    model = make()
    kind = type(model)
    with pytest.warns(UserWarning, match="nothing was replaced"):
        report = kernels.patch(model, min_gain=0)
    assert report.replaced == []
    assert type(model) is kind
    assert [r.name for r in report.refused] == [""]
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(report.refused[0].reason)


class ScaledAttention(attentions.LinearAttention):
    def forward(self, x: Tensor) -> Tensor:
        return 1.01 * super().forward(x)


class TransposedAttention(attentions.EfficientAttention):
    """Queries over tokens too."""

    def forward(self, x: Tensor) -> Tensor:
        return self.reprojection(self.values(x) * self.queries(x).flatten(2).softmax(-1).view_as(x) + self.keys(x))


class PairsAttention(attentions.LinearAttention):
    """Ordinary attention, of each image's tokens with one another."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.flatten(2).unflatten(1, (self.heads, -1)) for t in self.to_qkv(self.norm(x)).chunk(3, 1))
        scores = torch.einsum("bhdi,bhdj->bhij", q * self.scale, k).softmax(-1)
        return self.to_out(torch.einsum("bhij,bhdj->bhdi", scores, v).flatten(1, 2).unflatten(2, x.shape[2:]))


class CalledPairsAttention(PairsAttention):
    """The same by PyTorch's function."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.flatten(2).unflatten(1, (self.heads, -1)) for t in self.to_qkv(self.norm(x)).chunk(3, 1))
        found = nn.functional.scaled_dot_product_attention(*(t.transpose(2, 3) for t in (q, k, v)))
        return self.to_out(found.transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:]))


@pytest.mark.parametrize(
    "make",
    [
        *(TransposedAttention, PairsAttention, CalledPairsAttention),
        lambda: relu_attentions.TokenAttention(relu_attentions.SoftmaxProcessor()),
        lambda: nn.MultiheadAttention(8, 2),
        lambda: nn.TransformerEncoderLayer(8, 2, 16),
    ],
)
def test_ordinary_attention_is_passed_over_without_a_word(make: Callable[[], nn.Module]) -> None:
    model = make()
    kind = type(model)
    with pytest.warns(UserWarning, match="no module looks like one"):
        report = kernels.patch(model, min_gain=0)
    assert report.replaced == report.refused == []
    assert type(model) is kind


class SquaredFeatures(relu_attentions.TokenProcessor):
    """Linear attention of other features."""

    def features(self, x: Tensor) -> Tensor:
        return nn.functional.relu(x).square()


@pytest.mark.parametrize(
    "make",
    [
        *(ScaledAttention, relu_attentions.UnevenMultiScaleAttention),
        lambda: relu_attentions.TokenAttention(SquaredFeatures()),
    ],
)
def test_linear_attention_that_computes_something_else_is_reported(make: Callable[[], nn.Module]) -> None:
    model = make()
    kind = type(model)
    with pytest.warns(UserWarning, match=r"something else: efficient_\w*attention .* comes nearest and differs by"):
        report = kernels.patch(model, min_gain=0)
    assert [(r.name, r.class_name) for r in report.refused] == [("", kind.__name__)]
    assert type(model) is kind


class PostNormBlock(blocks.ImageBlock):
    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        x = images.image_to_tokens(x)
        x = self.norm1(x + self.attn(x, height, width))
        x = self.norm2(x + self.mlp(x, height, width))
        return images.tokens_to_image(x, height, width)


class TensorBlock(blocks.TupleBlock):
    def forward(self, x: Tensor, height: int, width: int) -> Tensor:  # type: ignore[override]
        return super().forward(x, height, width)[0]


def test_of_another_block_only_the_feed_forward_layer_is_replaced() -> None:
    report = kernels.patch(PostNormBlock(), min_gain=0)
    assert [r.name for r in report.replaced] == ["mlp"]


@pytest.mark.parametrize("make", [blocks.TupleBlock, TensorBlock])
def test_a_block_returns_what_it_did(make: type[nn.Module]) -> None:
    """A tuple of one is no tensor."""
    model = make().eval()
    kernels.patch(model, min_gain=0)
    assert "norm" in repr(model)
    assert "block with mix_ffn" in model.extra_repr()
    assert isinstance(call_forward(model, HW), tuple if make is blocks.TupleBlock else Tensor)


def test_weights_of_zero_prove_nothing() -> None:
    """With weights of zero every activation gives the same output; the proof does not use these weights."""
    model = with_activation(nn.ELU())
    for p in model.parameters():
        nn.init.zeros_(p)
    with pytest.warns(UserWarning, match="computes something else"):
        kernels.patch(model)


class StraightThrough(mix_ffns.FlatMixFFN):
    """The same output, another gradient."""

    def forward(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        return x + (super().forward(x, feat_size) - x).detach()


class HalfFrozen(mix_ffns.FlatMixFFN):
    """The same output, no gradient of the first layer."""

    def forward(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        weight, bias = self.fc1.weight.detach(), self.fc1.bias.detach()
        hidden = images.tokens_to_image(nn.functional.linear(x, weight, bias), *feat_size)
        return self.fc2(self.act(images.image_to_tokens(self.dwconv(hidden))))


@pytest.mark.parametrize("make", [StraightThrough, HalfFrozen])
def test_the_same_output_with_another_gradient_is_something_else(make: type[nn.Module]) -> None:
    with pytest.warns(UserWarning, match="computes something else"):
        kernels.patch(make())


class SeldomDropped(mix_ffns.FlatMixFFN):
    """Drops an output once in a million times; no probe would see it."""

    def __init__(self, of_python: bool) -> None:
        super().__init__()
        self.of_python = of_python

    def forward(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        x = super().forward(x, feat_size)
        if not self.training:
            return x
        return x * float((random.random() if self.of_python else torch.rand(())) > 1e-6)


@pytest.mark.parametrize("of_python", [False, True])
def test_what_draws_random_numbers_keeps_its_forward_in_training(of_python: bool) -> None:
    model = SeldomDropped(of_python)
    assert "training" in kernels.patch(model).replaced[0].note
    assert operators_called(model.train(), SIZE) == []
    assert operators_called(model.eval(), SIZE) == ["msformer::mix_ffn"]


@pytest.mark.parametrize(
    ("make", "size", "called"),
    [
        (lambda: blocks.TupleBlock(drop_path=0.5), HW, "drop_path called"),
        (lambda: mix_ffns.ConvMixFFN(drop_path=0.5), SIZE, "dropout_layer called"),
    ],
)
def test_stochastic_depth_is_called_and_draws_what_it_did(
    make: Callable[[], nn.Module], size: tuple[Any, ...], called: str
) -> None:
    torch.manual_seed(0)
    model = make()
    ours = copy.deepcopy(model)
    row = kernels.patch(ours).replaced[0]
    assert called in row.options
    assert row.note == ""
    for training in (True, False):
        assert operators_called(ours.train(training), size) == ["msformer::mix_ffn"]
        for seed in range(4):
            torch.manual_seed(seed)
            found = call(ours.train(training), size)
            torch.manual_seed(seed)
            for a, b in zip(found, call(model.train(training), size), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changed", ["norm2", "mlp.norm1"])
def test_the_eps_of_either_norm_counts(changed: str) -> None:
    """The operator has one for both."""
    x = torch.randn(1, 24, 8) * 1e-3
    late, early, original = (blocks.EfficientBlock().eval() for _ in range(3))
    late.load_state_dict(original.state_dict())
    early.load_state_dict(original.state_dict())
    kernels.patch(late)
    for block in (late, early, original):
        block.get_submodule(changed).eps = 1e-2  # type: ignore[assignment]
    assert [r.name for r in kernels.patch(early).replaced] == ["attn", "mlp"]
    with torch.no_grad():
        for block in (late, early):
            torch.testing.assert_close(block(x, 6, 4), original(x, 6, 4), atol=1e-6, rtol=1e-5)


def test_two_images_of_another_height_and_width_are_compared() -> None:
    """A module that works on squares of the height only is something else."""

    class Square(mix_ffns.FlatMixFFN):
        def forward(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
            return super().forward(x, (feat_size[1], feat_size[0]))

    with pytest.warns(UserWarning, match="computes something else"):
        assert kernels.patch(Square()).replaced == []


def test_a_module_that_fails_on_the_probe_is_left_alone() -> None:
    class Fixed(mix_ffns.FlatMixFFN):
        def forward(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
            assert feat_size == (16, 16), "only 16 x 16"
            return super().forward(x, feat_size)

    with pytest.warns(UserWarning, match="cannot be compared with mix_ffn: AssertionError: only 16 x 16"):
        kernels.patch(Fixed())


def test_the_meta_device_is_refused_with_the_reason() -> None:
    with torch.device("meta"):
        model = mix_ffns.FlatMixFFN()
    with pytest.warns(UserWarning, match="on the meta device"):
        report = kernels.patch(model)
    assert "meta device" in report.refused[0].reason


def test_nan_is_no_proof() -> None:
    from msformer_kernels.patching.proof import Results, _deviation

    exact, found = (Results(Tensor, 1, [torch.tensor([v])]) for v in (1.0, float("nan")))
    assert math.isnan(_deviation(found, exact))
    assert not _deviation(found, exact) <= 1
