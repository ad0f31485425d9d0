"""Linear attention of diffusion models for videos, and with three layers that make query, key and value."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import msformer_kernels as kernels
from tests.kernels.patching import models


class VideoAttention(models.LinearAttention):
    """Of each frame of `[B, C, frames, H, W]`."""

    def forward(self, x: Tensor) -> Tensor:
        images = super().forward(x.transpose(1, 2).flatten(0, 1))
        return images.unflatten(0, (len(x), -1)).transpose(1, 2)


class LayersAttention(nn.Module):
    """Query, key and value have a layer and a depthwise convolution each, an activation comes before the last layer,
    and more keys may be given."""

    def __init__(self, channels: int = 8, heads: int = 2, dim_head: int = 4) -> None:
        super().__init__()
        self.scale, self.heads, inner = dim_head**-0.5, heads, heads * dim_head
        self.norm, self.nonlin = models.ChannelNorm(channels), nn.SiLU()
        self.to_q, self.to_k, self.to_v = (self.maker(channels, inner) for _ in range(3))
        self.to_out = nn.Sequential(nn.Conv2d(inner, channels, 1, bias=False), models.ChannelNorm(channels))

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


def results(model: nn.Module, *given: Tensor) -> list[Tensor]:
    """Output and gradients."""
    x = given[0].clone().requires_grad_()
    output = model(x, *given[1:])
    return [output.detach(), *torch.autograd.grad(output.square().sum(), [x, *model.parameters()])]


@pytest.mark.parametrize(
    ("make", "shape", "options"),
    [
        (VideoAttention, (2, 8, 3, 6, 4), "2 heads, scale 0.5, memory mem_kv, each frame"),
        (LayersAttention, (2, 8, 6, 4), "2 heads, scale 0.5"),
    ],
)
def test_it_is_replaced_and_computes_the_same(
    make: Callable[[], nn.Module], shape: tuple[int, ...], options: str
) -> None:
    torch.manual_seed(0)
    model, x = make().double().eval(), torch.randn(shape, dtype=torch.float64)
    expected = results(model, x)
    report = kernels.patch(model, min_gain=0)
    assert [(r.by, r.options) for r in report.replaced] == [("efficient_attention", options)]
    for found, exact in zip(results(model, x), expected, strict=True):
        torch.testing.assert_close(found, exact, atol=1e-10, rtol=1e-9)
    with torch.profiler.profile() as profile, torch.no_grad():
        model(x)
    assert any(event.name == "msformer::efficient_attention" for event in profile.events())


def test_more_keys_and_dropout_run_its_own_forward() -> None:
    torch.manual_seed(0)
    model, x, more = LayersAttention().eval(), torch.randn(2, 8, 6, 4), torch.randn(2, 2, 5, 4)
    expected = results(model, x, more)
    report = kernels.patch(model, min_gain=0)
    assert "its own forward in training" in report.replaced[0].note
    for found, exact in zip(results(model, x, more), expected, strict=True):
        torch.testing.assert_close(found, exact, atol=0, rtol=0)
    model.train()
    with torch.profiler.profile() as profile, torch.no_grad():
        model(x)
    assert not any(event.name.startswith("msformer::") for event in profile.events())
