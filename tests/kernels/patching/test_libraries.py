"""Models of other libraries, where they are installed: transformers, timm, segmentation_models_pytorch and others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import msformer_kernels as kernels
from benchmarks.integration_models import MODELS, diffusion_unet

IMAGE = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
REPLACED = (
    *(
        f"transformers-{version}/{name}"
        for version in "45"
        for name in ("segformer-b0", "pvt-v2-b0", "pvt-v2-b0-li", "glpn")
    ),
    *("timm/pvt_v2_b0", "smp/unet-mit_b0"),
)


def made(name: str) -> nn.Module:
    """A model, if what it needs is installed."""
    model = MODELS[name]
    if reason := model.missing():
        pytest.skip(reason)
    return model.make()


def outputs(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """And the gradients of all parameters."""
    torch.manual_seed(0)
    found: Any = model(IMAGE)
    values = list(found.values()) if isinstance(found, dict) else [found]
    tensors = [v for v in values if isinstance(v, Tensor)]
    total = sum(v.square().mean() for v in tensors)
    assert isinstance(total, Tensor)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    pairs = zip(gradients, parameters, strict=True)
    return [t.detach() for t in tensors], [torch.zeros_like(p) if g is None else g for g, p in pairs]


@pytest.mark.slow
@pytest.mark.parametrize("name", REPLACED)
def test_feed_forward_layers_and_blocks_are_replaced(name: str) -> None:
    torch.manual_seed(0)
    model = made(name).double()  # in float32 the originals differ from that by up to 1e-3
    state = copy.deepcopy(model.state_dict())

    def in_mode(training: bool) -> tuple[list[Tensor], list[Tensor]]:
        model.load_state_dict(state)  # BatchNorm changes it in training
        return outputs(model.train(training))

    originals = {training: in_mode(training) for training in (False, True)}
    report = kernels.patch(model)
    assert [r.by for r in report.replaced] == ["block with mix_ffn", "mix_ffn"] * 8
    assert max(r.error for r in report.replaced) < 1e-12
    for training, (expected, expected_gradients) in originals.items():
        found, gradients = in_mode(training)
        for a, b in zip(found, expected, strict=True):
            assert (a - b).norm() <= 1e-11 * b.norm()
        scale = max(float(g.norm()) for g in expected_gradients)
        assert max(float((a - b).norm()) for a, b in zip(gradients, expected_gradients, strict=True)) <= 1e-11 * scale


@pytest.mark.parametrize("name", ["timm/efficientvit_b1", "timm/mobilenetv2_100", "diffusers/sana"])
def test_what_only_looks_alike_is_left_alone(name: str) -> None:
    model = made(name)
    with pytest.warns(UserWarning, match="nothing was replaced"):
        report = kernels.patch(model, min_gain=0)
    assert report.replaced == []
    assert report.refused != []


def test_a_diffusion_unet() -> None:
    pytest.importorskip("denoising_diffusion_pytorch")
    model = diffusion_unet(16).eval()
    image, step = torch.randn(1, 3, 32, 16), torch.tensor([3])
    with torch.no_grad():
        expected = model(image, step)
        report = kernels.patch(model, min_gain=0)
        assert [r.by for r in report.replaced] == ["efficient_attention"] * 6
        torch.testing.assert_close(model(image, step), expected, atol=1e-5, rtol=1e-4)
