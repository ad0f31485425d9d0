"""Linear attention of diffusion models for videos, and with three layers that make query, key and value."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import msformer_kernels as kernels
from tests.kernels.patching.models import attentions


class VideoAttention(attentions.LinearAttention):
    """Of each frame of `[B, C, frames, H, W]`."""

    def forward(self, x: Tensor) -> Tensor:
        images = super().forward(x.transpose(1, 2).flatten(0, 1))
        return images.unflatten(0, (len(x), -1)).transpose(1, 2)


class CentredAttention(attentions.LinearAttention):
    """With a LayerNorm over channels, without bias, and no memory."""

    class Norm(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.eps, self.gamma = 1e-3, nn.Parameter(torch.ones(1, channels, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            variance, mean = torch.var_mean(x, dim=1, unbiased=False, keepdim=True)
            return (x - mean) / (variance + self.eps).sqrt() * self.gamma

    def __init__(self) -> None:
        super().__init__(memory=0)
        self.norm = self.Norm(8)


class BiasedAttention(attentions.LinearAttention):
    """Keys of the images have a bias, those of the memory have not."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = nn.Conv2d(8, 24, 1)


class LayersAttention(nn.Module):
    """Query, key and value have a layer and a depthwise convolution each, an activation comes before the last layer,
    and more keys may be given."""

    def __init__(self, channels: int = 8, heads: int = 2, dim_head: int = 4) -> None:
        super().__init__()
        self.scale, self.heads, inner = dim_head**-0.5, heads, heads * dim_head
        self.norm, self.nonlin = attentions.ChannelNorm(channels), nn.SiLU()
        self.to_q, self.to_k, self.to_v = (self.maker(channels, inner) for _ in range(3))
        self.to_out = nn.Sequential(nn.Conv2d(inner, channels, 1, bias=False), attentions.ChannelNorm(channels))

    @staticmethod
    def maker(channels: int, inner: int) -> nn.Sequential:
        depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        return nn.Sequential(nn.Dropout(0.1), nn.Conv2d(channels, inner, 1, bias=False), depthwise)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        made = (layer(self.norm(x)) for layer in (self.to_q, self.to_k, self.to_v))
        q, k, v = (t.unflatten(1, (self.heads, -1)).flatten(3).transpose(2, 3) for t in made)
        if context is not None:
            k, v = torch.cat((k, context), 2), torch.cat((v, context), 2)
        found = (q.softmax(-1) * self.scale) @ (k.softmax(-2).transpose(-1, -2) @ v)
        image = found.transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:])
        return self.to_out(self.nonlin(image))


WITH_LAYERS = "efficient_self_attention"
MEMORY = "2 heads, scale 0.5, memory mem_kv"


def results(model: nn.Module, *given: Tensor) -> list[Tensor]:
    """Output and gradients."""
    x = given[0].clone().requires_grad_()
    output = model(x, *given[1:])
    return [output.detach(), *torch.autograd.grad(output.square().sum(), [x, *model.parameters()])]


@pytest.mark.parametrize(
    ("make", "shape", "by", "options"),
    [
        (
            VideoAttention,
            (2, 8, 3, 6, 4),
            WITH_LAYERS,
            "2 heads, scale 0.5, memory mem_kv, each frame, rms norm norm.g, rms norm to_out.1.g",
        ),
        (CentredAttention, (2, 8, 6, 4), WITH_LAYERS, "2 heads, scale 0.5, layer norm norm.gamma"),
        (BiasedAttention, (2, 8, 6, 4), WITH_LAYERS, f"{MEMORY}, rms norm norm.g, rms norm to_out.1.g"),
        (LayersAttention, (2, 8, 6, 4), "efficient_attention", "2 heads, scale 0.5"),
    ],
)
def test_it_is_replaced_and_computes_the_same(
    make: Callable[[], nn.Module], shape: tuple[int, ...], by: str, options: str
) -> None:
    torch.manual_seed(0)
    model, x = make().double().eval(), torch.randn(shape, dtype=torch.float64)
    expected = results(model, x)
    report = kernels.patch(model, min_gain=0)
    assert [(r.by, r.options) for r in report.replaced] == [(by, options)]
    for found, exact in zip(results(model, x), expected, strict=True):
        torch.testing.assert_close(found, exact, atol=1e-10, rtol=1e-9)
    with torch.profiler.profile() as profile, torch.no_grad():
        model(x)
    assert any(event.name == f"msformer::{by}" for event in profile.events())


def test_more_keys_run_its_own_forward_and_dropout_draws_what_it_did() -> None:
    torch.manual_seed(0)
    model, x, more = LayersAttention().eval(), torch.randn(2, 8, 6, 4), torch.randn(2, 2, 5, 4)
    expected = results(model, x, more)
    report = kernels.patch(model, min_gain=0)
    assert report.replaced[0].note == ""
    for found, exact in zip(results(model, x, more), expected, strict=True):
        torch.testing.assert_close(found, exact, atol=0, rtol=0)
    model.train()
    with torch.profiler.profile() as profile, torch.no_grad():
        torch.manual_seed(1)
        found = model(x)
    assert any(event.name.startswith("msformer::") for event in profile.events())
    report.undo()
    torch.manual_seed(1)
    torch.testing.assert_close(found, model(x))


def test_a_layer_that_must_be_called_leaves_the_attention_to_be_fused() -> None:
    torch.manual_seed(0)
    model, x = attentions.LinearAttention().double(), torch.randn(2, 8, 6, 4, dtype=torch.float64)
    calls: list[nn.Module] = []
    model.to_qkv.register_forward_hook(lambda module, *_: calls.append(module))
    expected = results(model, x)
    assert [r.by for r in kernels.patch(model, min_gain=0).replaced] == ["efficient_attention"]
    calls.clear()
    for found, exact in zip(results(model, x), expected, strict=True):
        torch.testing.assert_close(found, exact, atol=1e-10, rtol=1e-9)
    assert calls == [model.to_qkv]


@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast"])
def test_the_error_is_no_larger_than_that_of_the_original(how: str) -> None:
    """RMS of output and gradients over several draws, against float64; both norms are computed here."""
    dtype = torch.float32 if how == "autocast" else getattr(torch, how)
    errors = {"own": 0.0, "ours": 0.0}
    for seed in range(4):
        torch.manual_seed(seed)
        model, x = attentions.LinearAttention(16), torch.randn(2, 16, 6, 5)
        ours = copy.deepcopy(model)
        assert len(kernels.patch(ours, min_gain=0).replaced) == 1
        exact = results(copy.deepcopy(model).double(), x.double())
        for name, each in (("own", model), ("ours", ours)):
            with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
                found = results(each.to(dtype), x.to(dtype))
            assert found[0].dtype == (torch.float32 if how == "autocast" else dtype)
            errors[name] += sum(float(((f - e).norm() / e.norm()) ** 2) for f, e in zip(found, exact, strict=True))
    assert errors["ours"] <= 1.25**2 * errors["own"], errors


@pytest.mark.parametrize("touched", ["norm", "to_qkv", "to_out", "to_out.0", "to_out.1"])
def test_what_is_hooked_after_the_patch_is_called(touched: str) -> None:
    torch.manual_seed(0)
    model, x = attentions.LinearAttention().double(), torch.randn(2, 8, 6, 4, dtype=torch.float64)
    kernels.patch(model, min_gain=0)
    calls: list[Tensor] = []
    model.get_submodule(touched).register_forward_hook(lambda module, given, output: calls.append(output))
    model(x)
    assert len(calls) == 1
