"""Models of other libraries, where they are installed: transformers, timm, segmentation_models_pytorch and others."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import msformer_kernels as kernels
from benchmarks.integration_models import MODELS, diffusion_unet

IMAGE = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
REPLACED = (
    *(f"transformers-{version}/{name}" for version in "45" for name in ("segformer-b0", "pvt-v2-b0-li")),
    *("timm/pvt_v2_b0", "smp/unet-mit_b0"),
)
"""Of models that are alike one; `python -m benchmarks.integrations` compares all."""


def made(name: str) -> nn.Module:
    """A model, if what it needs is installed."""
    model = MODELS[name]
    if reason := model.missing():
        pytest.skip(reason)
    return model.make()


def with_statistics(model: nn.Module) -> nn.Module:
    """Those of two batches, so that a BatchNorm in evaluation mode is no identity."""
    model.train()
    with torch.no_grad():
        for seed in range(2):
            model(torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(seed)))
    return model


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


def assert_same(
    found: tuple[list[Tensor], list[Tensor]], expected: tuple[list[Tensor], list[Tensor]], tolerance: float = 1e-11
) -> None:
    for a, b in zip(found[0], expected[0], strict=True):
        assert (a - b).norm() <= tolerance * b.norm()
    scale = max(float(g.norm()) for g in expected[1])
    worst = max(float((a - b).norm()) for a, b in zip(found[1], expected[1], strict=True))
    assert worst <= tolerance * scale


@pytest.mark.slow(3)
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
    decoders = ["all-MLP decoder"] * ("segformer" in name)
    assert [r.by for r in report.replaced] == ["block with mix_ffn", "mix_ffn"] * 8 + decoders
    assert max(r.error for r in report.replaced) < 1e-10  # attention saturates
    for training, expected in originals.items():
        assert_same(in_mode(training), expected)


@pytest.mark.parametrize(
    ("name", "activation", "counts"),
    [
        ("timm/efficientvit_b1", "hardswish", {"mix_ffn": 10, "efficient_attention": 7}),
        ("timm/mobilenetv2_100", "relu6", {"mix_ffn": 10}),
    ],
)
def test_batch_norms_are_folded_and_relu_attention_is_replaced(
    name: str, activation: str, counts: dict[str, int]
) -> None:
    model = with_statistics(made(name)).double().eval()
    expected = outputs(model)
    report = kernels.patch(model, min_gain=0)
    assert Counter(r.by for r in report.replaced) == counts
    folded = [r.options for r in report.replaced if r.by == "mix_ffn"]
    assert all(options.startswith(f"{activation}, {activation} before") for options in folded)
    # timm's attention rounds to float32
    assert_same(outputs(model), expected, 1e-11 if set(counts) == {"mix_ffn"} else 1e-5)


def test_squeeze_excitation_is_left_alone() -> None:
    model = pytest.importorskip("timm").create_model("efficientnet_b0")
    with pytest.warns(UserWarning, match="this has 4"):
        report = kernels.patch(model, min_gain=0)
    assert len(report.refused) == 16


def test_a_diffusion_unet() -> None:
    pytest.importorskip("denoising_diffusion_pytorch")
    model = diffusion_unet(16).eval()
    image, step = torch.randn(1, 3, 32, 16), torch.tensor([3])
    with torch.no_grad():
        expected = model(image, step)
        report = kernels.patch(model, min_gain=0)
        assert [r.by for r in report.replaced] == ["efficient_self_attention"] * 6
        torch.testing.assert_close(model(image, step), expected, atol=1e-5, rtol=1e-4)


def sana_inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 32, 8, 6), (1, 5, 64))
    image, text = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return {"hidden_states": image, "encoder_hidden_states": text, "timestep": torch.tensor([3]), "return_dict": False}


def test_linear_attention_of_sana_is_replaced_until_its_processor_changes() -> None:
    """Of text and image, ordinary attention stays, without a word."""
    torch.manual_seed(0)
    model = made("diffusers/sana").double().eval()
    named = sana_inputs()
    (expected,) = model(**named)
    report = kernels.patch(model, min_gain=0)
    assert Counter((r.name.split(".")[-1], r.by) for r in report.replaced) == {
        ("attn1", "efficient_attention"): 4,
        ("ff", "mix_ffn"): 4,
    }
    assert report.refused == []
    (found,) = model(**named)
    assert (found - expected).norm() <= 1e-5 * expected.norm()  # the attention rounds to float32

    attention = model.transformer_blocks[0].attn1
    x, text = torch.randn(1, 24, 256, dtype=torch.float64), torch.randn(1, 5, 256, dtype=torch.float64)
    for processor in (attention.processor, model.transformer_blocks[0].attn2.processor):
        attention.set_processor(processor)
        for arguments in ({}, {"encoder_hidden_states": text}):
            original = type(attention).__mro__[1].forward(attention, x, **arguments)
            torch.testing.assert_close(attention(x, **arguments), original, atol=1e-5, rtol=1e-4)


def test_keys_of_a_text_are_left_to_imagens_linear_attention() -> None:
    made("imagen/unet")  # which imports the package as it must be
    from imagen_pytorch.imagen_pytorch import LinearAttention

    torch.manual_seed(0)
    model = LinearAttention(16, 4, 2, context_dim=12).double().eval()
    x, text = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 16, 6, 4), (2, 5, 12)))
    expected, of_text = model(x), model(x, text)
    report = kernels.patch(model, min_gain=0)
    assert [(r.by, r.options) for r in report.replaced] == [("efficient_attention", "2 heads, scale 0.5")]
    torch.testing.assert_close(model(x), expected, atol=1e-12, rtol=1e-10)
    assert torch.equal(model(x, text), of_text)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_ordinary_attention_of_timm_is_no_line_in_the_report(name: str) -> None:
    model = pytest.importorskip("timm").create_model(name)
    with pytest.warns(UserWarning, match="no module looks like one"):
        kernels.patch(model, min_gain=0)


@pytest.mark.parametrize("name", ["Bert", "ViT", "CLIPVision"])
def test_ordinary_attention_of_transformers_is_no_line_in_the_report(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes))
    with pytest.warns(UserWarning, match="no module looks like one"):
        kernels.patch(model, min_gain=0)


def test_the_convolution_of_mambaout_is_left_alone() -> None:
    model = pytest.importorskip("timm").create_model("mambaout_femto")
    with pytest.warns(UserWarning, match="as in MambaOut"):
        report = kernels.patch(model, min_gain=0)
    assert report.replaced == []
    assert len(report.refused) == 18
