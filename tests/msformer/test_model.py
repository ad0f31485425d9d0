"""The model: golden values, sizes, options."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import msformer_kernels as kernels
from msformer import LossWeights, MSFormer
from msformer.losses import cross_entropy, inter_scale, intra_scale, total_loss
from msformer.model import convolution_as_product
from tests.msformer.conftest import FAST_BACKENDS

GOLDEN = Path(__file__).parent.parent / "data" / "msformer_65px_12ch_2layers.safetensors"


def tiny(**options: int) -> MSFormer:
    torch.manual_seed(0)
    return MSFormer(**({"embed_dim": 6, "depth": 1} | options))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_golden_values(backend: str, dtype: torch.dtype) -> None:
    """Outputs, losses and every gradient of the published definition, computed in float64."""
    golden = load_file(GOLDEN)

    def check(name: str, found: Tensor) -> None:
        expected = golden[name]
        # the gradients are stored rounded to float32
        tolerance = 1e-4 if dtype == torch.float32 else 1e-9 if expected.dtype == torch.float64 else 6e-8
        # biases before a BatchNorm or under the softmax over tokens have gradient zero, up to rounding
        scale = expected.abs().max().item() if expected.abs().max() > 1e-12 else 1.0
        assert found.shape == expected.shape, name
        assert (found.detach().double() - expected).abs().max().item() <= tolerance * scale, name

    model = MSFormer(embed_dim=12)
    model.load_state_dict(
        {k.removeprefix("weight."): v for k, v in golden.items() if k.startswith("weight.")}, strict=True
    )
    model.to(dtype)
    with kernels.use_backend(backend):
        output = model(golden["input.image"].to(dtype))
        for name, value in output._asdict().items():
            check(f"output.{name}", value)
        labels = output.logits.argmax(1)
        check("loss.ce", cross_entropy(output.logits, labels))
        check("loss.inter", inter_scale(output.context_small, output.context_large))
        check("loss.intra", intra_scale(output.attention))
        total = total_loss(output, labels, LossWeights())
        check("loss.total", total)
        total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        check(f"grad.{name}", parameter.grad)


@pytest.mark.parametrize(("height", "width"), [(33, 33), (34, 47), (64, 33), (65, 96), (97, 66)])
def test_any_size_from_33(height: int, width: int) -> None:
    output = tiny()(torch.rand(1, 3, height, width))
    patches = ((height - 1) // 32) * ((width - 1) // 32)
    assert output.logits.shape == (1, 6, height, width)
    assert output.attention.shape == (1, patches, patches)
    torch.testing.assert_close(output.attention.sum(-1), torch.ones(1, patches))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(33, 33), (34, 41)])
def test_convolution_as_product(size: tuple[int, int], stride: int) -> None:
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, 5, 3, stride=stride, padding=1, dtype=torch.float64)
    image = torch.rand(2, 3, *size, dtype=torch.float64)
    expected = convolution(image)
    tokens, height, width = convolution_as_product(convolution, image)
    assert (height, width) == tuple(expected.shape[2:])
    torch.testing.assert_close(tokens.transpose(1, 2).unflatten(2, (height, width)), expected)
    for found, wanted in zip(
        torch.autograd.grad(tokens.square().sum(), convolution.parameters()),
        torch.autograd.grad(expected.square().sum(), convolution.parameters()),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


def test_options() -> None:
    output = tiny(num_clusters=9, embed_dim=8, num_heads=2, in_channels=1, depth=2)(torch.rand(2, 1, 33, 40))
    assert output.logits.shape == (2, 9, 33, 40)
    assert output.context_small.shape == output.context_large.shape == (2, 8, 4)
    assert tiny()(torch.rand(1, 3, 33, 33), attention=False).attention.numel() == 0


def test_logits_equal_the_unfused_layers() -> None:
    """linear_up, unfold, crop, concatenate, linear_down, as published."""
    model = tiny(num_clusters=5).double()
    small, large = torch.randn(1, 35 * 33, 6, dtype=torch.float64), torch.randn(1, 18 * 17, 6, dtype=torch.float64)
    up = model.linear_up(large).view(1, 18, 17, 2, 2, 6).transpose(2, 3).reshape(1, 36, 34, 6)[:, :35, :33]
    expected = model.linear_down(torch.cat([up, small.view(1, 35, 33, 6)], -1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(model._logits(small, large, (35, 33), (18, 17)), expected)


def test_icnr_tells_no_pixels_of_a_flat_image_apart() -> None:
    """But near its edges, where convolutions see zeros."""
    model, flat = tiny(depth=1), torch.full((1, 3, 48, 48), 0.3)
    inner = model(flat).logits[0, :, 16:32, 16:32]
    assert inner.flatten(1).std(1).max() > 1e-2
    assert (inner - inner[:, ::2, ::2].repeat_interleave(2, 1).repeat_interleave(2, 2)).abs().max() > 1e-2
    first = model.linear_up.weight[:6].clone()
    model.initialise_icnr()
    assert model(flat).logits[0, :, 16:32, 16:32].flatten(1).std(1).max() < 1e-5
    assert all(torch.equal(phase, first) for phase in model.linear_up.weight.split(6))


def test_bad_images_and_sizes() -> None:
    with pytest.raises(ValueError, match=r"image: 32 x 40 pixels are too small, expected at least 33"):
        tiny()(torch.rand(1, 3, 32, 40))
    with pytest.raises(ValueError, match=r"image: expected \[B, 3, H, W\], got \(1, 1, 40, 40\)"):
        tiny()(torch.rand(1, 1, 40, 40))
    with pytest.raises(ValueError, match=r"image: expected \[B, 3, H, W\], got \(3, 40, 40\)"):
        tiny()(torch.rand(3, 40, 40))
    with pytest.raises(ValueError, match="depth: expected at least 1, got 0"):
        tiny(depth=0)
    with pytest.raises(ValueError, match="num_heads: 4 does not divide"):
        tiny(num_heads=4)


def test_losses_by_hand() -> None:
    logits = torch.zeros(1, 4, 2, 2)
    assert cross_entropy(logits, logits.argmax(1)).item() == pytest.approx(torch.log(torch.tensor(4.0)).item())
    rows = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    assert inter_scale(rows, rows).item() == pytest.approx(0, abs=1e-6)
    assert inter_scale(rows, rows.flip(1)).item() == pytest.approx(1)
    assert intra_scale(torch.full((1, 2, 2), 0.5)).item() == pytest.approx(0.5)


def test_switched_off_losses_are_not_computed() -> None:
    output = tiny()(torch.rand(1, 3, 33, 33))
    poisoned = output._replace(
        attention=output.attention * float("nan"), context_large=output.context_large * float("nan")
    )
    labels = output.logits.argmax(1)
    assert total_loss(poisoned, labels, LossWeights(2.0, 0.0, 0.0)).item() == pytest.approx(
        2 * cross_entropy(output.logits, labels).item()
    )
    with pytest.raises(ValueError, match="all losses are switched off"):
        LossWeights(0, 0, 0)
    with pytest.raises(ValueError, match="intra is -1"):
        LossWeights(intra=-1)
    with pytest.raises(ValueError, match="ce is nan"):
        LossWeights(ce=float("nan"))


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_compile_fullgraph(backend: str) -> None:
    torch.manual_seed(0)
    model, image = MSFormer(embed_dim=8, depth=1), torch.rand(1, 3, 65, 50)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def gradients(call: torch.nn.Module) -> tuple[Tensor, ...]:
        output = call(image)
        loss = total_loss(output, output.logits.argmax(1), LossWeights())
        return torch.autograd.grad(loss, list(model.parameters()))

    with kernels.use_backend(backend):
        for found, expected in zip(gradients(compiled), gradients(model), strict=True):
            torch.testing.assert_close(found, expected)
