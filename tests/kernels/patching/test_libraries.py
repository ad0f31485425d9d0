"""Models of other libraries, where they are installed: transformers, timm, segmentation_models_pytorch and others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import msformer_kernels as kernels

IMAGE = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def segformer() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig())


def pvt_v2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.PvtV2Model(transformers.PvtV2Config())


def pvt_v2_linear() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.PvtV2Model(transformers.PvtV2Config(linear_attention=True))


def glpn() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.GLPNModel(transformers.GLPNConfig())


def timm_pvt() -> nn.Module:
    return pytest.importorskip("timm").create_model("pvt_v2_b0")


def timm_pvt_li() -> nn.Module:
    return pytest.importorskip("timm").create_model("pvt_v2_b2_li")


def timm_efficientvit() -> nn.Module:
    return with_statistics(pytest.importorskip("timm").create_model("efficientvit_b0"))


def timm_mobilenet() -> nn.Module:
    return with_statistics(pytest.importorskip("timm").create_model("mobilenetv2_100"))


def with_statistics(model: nn.Module) -> nn.Module:
    """Those of two batches, so that a BatchNorm in evaluation mode is no identity."""
    model.train()
    with torch.no_grad():
        for seed in range(2):
            model(torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(seed)))
    return model


def unet() -> nn.Module:
    return pytest.importorskip("segmentation_models_pytorch").Unet("mit_b0", encoder_weights=None)


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


def assert_same(model: nn.Module, expected: tuple[list[Tensor], list[Tensor]]) -> None:
    found, gradients = outputs(model)
    for a, b in zip(found, expected[0], strict=True):
        assert (a - b).norm() <= 1e-11 * b.norm()
    scale = max(float(g.norm()) for g in expected[1])
    assert max(float((a - b).norm()) for a, b in zip(gradients, expected[1], strict=True)) <= 1e-11 * scale


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("make", [segformer, pvt_v2, glpn, timm_pvt, unet], ids=lambda f: f.__name__)
def test_feed_forward_layers_and_blocks_are_replaced(make: Any, training: bool) -> None:
    torch.manual_seed(0)
    model = make().double().train(training)  # in float32 the originals differ from that by up to 1e-3
    expected = outputs(model)
    report = kernels.patch(model)
    assert [r.by for r in report.replaced] == ["block with mix_ffn", "mix_ffn"] * 8
    assert max(r.error for r in report.replaced) < 1e-10  # attention saturates
    assert_same(model, expected)
    report.undo()


@pytest.mark.parametrize(
    ("make", "count"), [(timm_pvt_li, 16), (pvt_v2_linear, 8)], ids=lambda p: getattr(p, "__name__", "")
)
def test_a_relu_before_the_convolution(make: Any, count: int) -> None:
    model = make().double().eval()
    expected = outputs(model)
    report = kernels.patch(model)
    assert [r.by for r in report.replaced] == ["block with mix_ffn", "mix_ffn"] * count
    assert {r.options for r in report.replaced[1::2]} == {"gelu, relu before the convolution"}
    assert_same(model, expected)


@pytest.mark.parametrize(
    ("make", "activation", "count"),
    [(timm_efficientvit, "hardswish", 6), (timm_mobilenet, "relu6", 10)],
    ids=lambda p: getattr(p, "__name__", ""),
)
def test_batch_norms_of_inverted_residuals_are_folded(make: Any, activation: str, count: int) -> None:
    model = make().double().eval()
    expected = outputs(model)
    report = kernels.patch(model, min_gain=0)
    assert len(report.replaced) == count
    assert all(r.options.startswith(f"{activation}, {activation} before") for r in report.replaced)
    assert_same(model, expected)


def test_squeeze_excitation_is_left_alone() -> None:
    model = pytest.importorskip("timm").create_model("efficientnet_b0")
    with pytest.warns(UserWarning, match="this has 4"):
        report = kernels.patch(model, min_gain=0)
    assert len(report.refused) == 16


def test_an_efficientvit() -> None:
    torch.manual_seed(0)
    model = timm_efficientvit().eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(image)
        report = kernels.patch(model, min_gain=0)
        assert {r.by for r in report.replaced} == {"efficient_attention"}
        assert {r.class_name for r in report.replaced} == {"LiteMLA"}
        torch.testing.assert_close(model(image), expected, atol=1e-5, rtol=1e-4)


def test_a_diffusion_unet() -> None:
    model = pytest.importorskip("denoising_diffusion_pytorch").Unet(16).eval()
    image, step = torch.randn(1, 3, 32, 16), torch.tensor([3])
    with torch.no_grad():
        expected = model(image, step)
        report = kernels.patch(model, min_gain=0)
        assert [r.by for r in report.replaced] == ["efficient_attention"] * 6
        torch.testing.assert_close(model(image, step), expected, atol=1e-5, rtol=1e-4)
