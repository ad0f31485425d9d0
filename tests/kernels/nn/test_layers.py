"""The layers: published parameter names, both input layouts, fused norm and residual, and the block written out."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import msformer_kernels as kernels
from tests.kernels.cases import require


def test_parameter_names_are_those_of_the_published_checkpoints() -> None:
    names = {name: tuple(p.shape) for name, p in kernels.EfficientTransformerBlock(6).named_parameters()}
    assert names == {
        "norm1.weight": (6,),
        "norm1.bias": (6,),
        "attn.keys.weight": (6, 6, 1, 1),
        "attn.keys.bias": (6,),
        "attn.queries.weight": (6, 6, 1, 1),
        "attn.queries.bias": (6,),
        "attn.values.weight": (6, 6, 1, 1),
        "attn.values.bias": (6,),
        "attn.reprojection.weight": (6, 6, 1, 1),
        "attn.reprojection.bias": (6,),
        "norm2.weight": (6,),
        "norm2.bias": (6,),
        "mlp.fc1.weight": (24, 6),
        "mlp.fc1.bias": (24,),
        "mlp.dwconv.dwconv.weight": (24, 1, 3, 3),
        "mlp.dwconv.dwconv.bias": (24,),
        "mlp.fc2.weight": (6, 24),
        "mlp.fc2.bias": (6,),
        "mlp.norm1.weight": (24,),
        "mlp.norm1.bias": (24,),
    }


@pytest.mark.parametrize("channels_last", [False, True])
def test_attention_of_an_image(channels_last: bool) -> None:
    layer = kernels.EfficientAttention(6, key_channels=4, value_channels=10, num_heads=2)
    image = torch.randn(2, 6, 3, 5)
    image = image.contiguous(memory_format=torch.channels_last) if channels_last else image
    output, context = layer(image)
    expected, expected_context = layer(image.flatten(2).transpose(1, 2).contiguous())
    assert output.shape == image.shape
    torch.testing.assert_close(output.flatten(2).transpose(1, 2), expected)
    torch.testing.assert_close(context, expected_context)


def test_channels_last_images_are_not_copied() -> None:
    if kernels.explain().chosen == "reference":
        pytest.skip("the reference does not pass through the op")
    image = torch.randn(1, 6, 3, 5).contiguous(memory_format=torch.channels_last)
    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func.namespace == "msformer":
                seen.append(args[0].data_ptr())
            return func(*args, **(kwargs or {}))

    with Record():
        kernels.EfficientAttention(6)(image)
    assert seen == [image.data_ptr()]


@pytest.mark.parametrize("ffn", ["mix_skip", "mix", "mlp"])
def test_block_is_norm_attention_residual_norm_ffn_residual(ffn: str) -> None:
    block = kernels.EfficientTransformerBlock(8, num_heads=2, ffn=ffn, mlp_ratio=3)
    x = torch.randn(2, 15, 8)
    found, context = block(x, 3, 5)
    attended, expected_context = block.attn(block.norm1(x))
    x = x + attended
    expected = x + block.mlp(block.norm2(x), 3, 5)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(context, expected_context)
    assert context.shape == (2, 2, 4, 4)


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
def test_mix_ffn_skip_written_out(kernel_size: int) -> None:
    layer = kernels.MixFFNSkip(6, 10, kernel_size=kernel_size)
    x = torch.randn(2, 12, 6)
    hidden = layer.fc1(x)
    mixed = layer.dwconv.dwconv(hidden.transpose(1, 2).view(2, 10, 3, 4)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(layer(x, 3, 4), layer.fc2(F.gelu(layer.norm1(mixed + hidden))))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_mix_ffn_activation(activation: str) -> None:
    layer = kernels.MixFFN(6, 10, activation=activation)
    apply = {"gelu": F.gelu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"), "relu": F.relu}[activation]
    x = torch.randn(2, 12, 6)
    mixed = layer.dwconv.dwconv(layer.fc1(x).transpose(1, 2).view(2, 10, 3, 4)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(layer(x, 3, 4), layer.fc2(apply(mixed)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (partial(F.gelu, approximate="tanh"), "gelu_tanh"),
        (partial(nn.ReLU, inplace=True), "relu"),
        (torch.relu, "relu"),
        (F.silu, "silu"),
        (nn.Hardswish, "hardswish"),
        (nn.ReLU6(inplace=True), "relu6"),
        (nn.Identity(), "identity"),
    ],
)
def test_activations_as_modules_classes_and_functions(given: Any, name: str) -> None:
    assert kernels.MixFFN(6, 10, given).activation == name
    block = kernels.EfficientTransformerBlock(6, activation=given, inner_activation=given)
    assert (block.mlp.activation, block.mlp.inner_activation) == (name, name)
    assert kernels.EfficientTransformerBlock(6, ffn="mlp", activation=given).mlp.activation == name


def test_layers_are_the_same_fused_and_not() -> None:
    x = torch.randn(2, 12, 6)
    for make in (kernels.MixFFN, kernels.MixFFNSkip):
        layer = make(6, 10, nn.SiLU(), inner_activation=nn.ReLU)
        fused = layer(x, 3, 4)
        layer.fc1.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(layer(x, 3, 4), fused, rtol=1e-5, atol=1e-6)
        assert "activation='silu', inner_activation='relu'" in repr(layer)


@pytest.mark.parametrize("ffn", ["mix_skip", "mlp"])
def test_a_block_takes_the_size_as_a_pair(ffn: str) -> None:
    block, x = kernels.EfficientTransformerBlock(6, ffn=ffn), torch.randn(2, 12, 6)
    torch.testing.assert_close(block(x, (3, 4)), block(x, 3, 4), rtol=0, atol=0)
    with pytest.raises(TypeError, match="expected two numbers or one pair, got 3 and None"):
        block(x, 3)


def hooked() -> nn.Module:
    module = nn.GELU()
    module.register_forward_hook(lambda module, given, output: 2 * output)
    return module


@pytest.mark.parametrize(
    "given", [nn.ELU(), nn.PReLU, F.elu, torch.tanh, "GELU", None, 3, partial(F.gelu, None), hooked(), lambda x: x]
)
def test_an_activation_that_is_none_of_these(given: Any) -> None:
    with pytest.raises(ValueError, match=re.escape("activation: expected one of 'gelu', 'gelu_tanh'")) as caught:
        kernels.MixFFN(6, 10, given)
    assert str(caught.value).endswith(f"got {given!r}")
    with pytest.raises(ValueError, match="inner_activation: expected one of"):
        kernels.MixFFN(6, 10, inner_activation=given)


def test_masked_tokens_do_not_reach_the_others() -> None:
    layer = kernels.EfficientAttention(6, num_heads=2)
    x = torch.randn(1, 7, 6)
    mask = torch.tensor([[True, True, False, True, False, True, True]])
    output, context = layer(x, mask=mask)
    expected, expected_context = layer(x[:, mask[0]])
    torch.testing.assert_close(output[:, mask[0]], expected)
    torch.testing.assert_close(context, expected_context)


@pytest.mark.parametrize("name", ["reference", "native"])
def test_eps_of_the_norms_reaches_the_operators(name: str) -> None:
    require(name)
    block, x = kernels.EfficientTransformerBlock(8), torch.randn(2, 12, 8)
    for norm in (block.norm1, block.norm2, block.mlp.norm1):
        norm.eps = 0.5
    with kernels.use_backend(name):
        attended, _ = block.attn(x, norm=block.norm1)
        expected, _ = block.attn(block.norm1(x))
        mixed = block.mlp(x, 3, 4)
    torch.testing.assert_close(attended, expected)
    hidden = block.mlp.fc1(x)
    convolved = block.mlp.dwconv.dwconv(hidden.transpose(1, 2).view(2, -1, 3, 4)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(mixed, block.mlp.fc2(F.gelu(block.mlp.norm1(convolved + hidden))))


def test_norm_without_parameters_and_norm_of_another_width() -> None:
    layer = kernels.EfficientAttention(6)
    x = torch.randn(1, 5, 6)
    bare = torch.nn.LayerNorm(6, elementwise_affine=False)
    torch.testing.assert_close(layer(x, norm=bare)[0], layer(bare(x))[0])
    with pytest.raises(ValueError, match=r"norm: expected a LayerNorm over 6 channels, got \(5,\)"):
        layer(x, norm=torch.nn.LayerNorm(5))
    with pytest.raises(ValueError, match=r"norm: has eps 0\.1"):
        kernels.MixFFNSkip(6, 12)(x, 1, 5, norm=torch.nn.LayerNorm(6, eps=0.1))


def test_layers_in_half_precision() -> None:
    block = kernels.EfficientTransformerBlock(8).bfloat16()
    output, context = block(torch.randn(1, 9, 8, dtype=torch.bfloat16), 3, 3)
    assert output.dtype == torch.bfloat16
    assert context.dtype == torch.float32
    output.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in block.parameters())


def test_block_on_the_meta_device_gives_shapes() -> None:
    with torch.device("meta"):
        block = kernels.EfficientTransformerBlock(8, num_heads=2)
        output, context = block(torch.empty(2, 12, 8), 3, 4)
    assert output.shape == (2, 12, 8)
    assert context.shape == (2, 2, 4, 4)


def test_layers_refuse_bad_sizes() -> None:
    with pytest.raises(ValueError, match="num_heads: 3 does not divide key_channels = 8"):
        kernels.EfficientAttention(8, num_heads=3)
    with pytest.raises(ValueError, match="num_heads: 3 does not divide value_channels = 8"):
        kernels.EfficientAttention(8, key_channels=6, num_heads=3)
    with pytest.raises(ValueError, match="in_channels: expected at least 1, got 0"):
        kernels.EfficientAttention(0)
    with pytest.raises(ValueError, match="hidden_features: expected at least 1, got -4"):
        kernels.MixFFN(4, -4)
    with pytest.raises(ValueError, match="activation: expected one of"):
        kernels.MixFFN(4, 8, activation="swish")
    with pytest.raises(ValueError, match="kernel_size: expected one of 3, 5, 7, got 4"):
        kernels.MixFFN(4, 8, kernel_size=4)
    with pytest.raises(ValueError, match="inner_activation: comes before a convolution"):
        kernels.EfficientTransformerBlock(8, ffn="mlp", inner_activation="relu")
    with pytest.raises(ValueError, match="ffn: expected one of mix_skip, mix, mlp, got 'moe'"):
        kernels.EfficientTransformerBlock(8, ffn="moe")
    with pytest.raises(ValueError, match="x: has 6 tokens"):
        kernels.EfficientTransformerBlock(8, ffn="mlp")(torch.randn(1, 6, 8), 2, 2)


@pytest.mark.parametrize("name", ["reference", "native"])
@pytest.mark.parametrize("shape", [(0, 12), (2, 0)], ids=["no_images", "no_tokens"])
def test_empty_input_gives_zero_gradients_to_every_parameter(shape: tuple[int, int], name: str) -> None:
    """Zeros, not None: DDP waits for a gradient of every parameter."""
    require(name)
    block = kernels.EfficientTransformerBlock(8)
    with kernels.use_backend(name):
        output, context = block(torch.randn(*shape, 8), 3 if shape[1] else 0, 4)
    assert output.shape == (*shape, 8)
    (output.sum() + context.sum()).backward()
    for parameter_name, parameter in block.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert not parameter.grad.any(), parameter_name


@pytest.mark.parametrize(
    "layer",
    [
        kernels.EfficientAttention(8, num_heads=2),
        kernels.MixFFN(8, 16),
        kernels.MixFFNSkip(8, 16),
        kernels.EfficientTransformerBlock(8),
        kernels.TokenLinear(8, 4),
        kernels.TokenBatchNorm(8),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_fx_refuses_what_it_cannot_trace_and_keeps_layers_whole(layer: nn.Module) -> None:
    with pytest.raises(torch.fx.proxy.TraceError, match="control flow"):
        torch.fx.symbolic_trace(layer)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return m is layer

    graph = Tracer().trace(nn.Sequential(layer))
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["0"]


def test_fx_traces_batch_norm_in_evaluation_mode() -> None:
    layer, x = kernels.TokenBatchNorm(8).eval(), torch.randn(2, 12, 8)
    torch.testing.assert_close(torch.fx.symbolic_trace(layer)(x), layer(x))
