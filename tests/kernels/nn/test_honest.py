"""Whatever tools do to a submodule, a layer computes what calls of its submodules give, and says why it calls them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

import msformer_kernels as kernels
from msformer_kernels.nn.mix_ffn import DepthwiseConv
from tests.kernels.cases import require
from tests.kernels.nn.tools import CALLS, DIM, HEIGHT, WEIGHTS, WIDTH, Adapter, outputs, place, written_out

LAYERS: dict[str, Any] = {
    "mix_ffn_skip": lambda: kernels.MixFFNSkip(DIM, 12),
    "mix_ffn": lambda: kernels.MixFFN(DIM, 12),
    "attention": lambda: kernels.EfficientAttention(DIM, num_heads=2),
    "block": lambda: kernels.EfficientTransformerBlock(DIM, num_heads=2),
    "block_mlp": lambda: kernels.EfficientTransformerBlock(DIM, num_heads=2, ffn="mlp"),
}
PLAIN = {
    "mix_ffn_skip": ["fc1", "dwconv.dwconv", "fc2", "norm1"],
    "mix_ffn": ["fc1", "dwconv.dwconv", "fc2"],
    "attention": ["queries", "keys", "values", "reprojection"],
    "block": ["norm1", "norm2", "mlp.fc1", "mlp.dwconv.dwconv", "mlp.fc2", "mlp.norm1", "attn.queries", "attn.values"],
    "block_mlp": ["norm2", "mlp.fc1", "mlp.fc2"],
}
HOLDERS = {"mix_ffn_skip": ["dwconv"], "mix_ffn": ["dwconv"], "block": ["mlp.dwconv", "attn", "mlp"]}
EVERY_CALL = [
    (layer, path, tool)
    for layer in LAYERS
    for path in (*PLAIN[layer], *HOLDERS.get(layer, []))
    for tool in CALLS
    if layer != "block" or path.count(".") == 0 or tool in ("wrapped", "forward_hook", "own_forward")
]
EVERY_WEIGHT = [
    (layer, path, tool)
    for layer in LAYERS
    for path in PLAIN[layer]
    for tool in WEIGHTS
    if not ("norm" in path and "spectral" in tool) and (layer != "block" or path.count(".") == 0)
]


def layer_and_tokens(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer, torch.randn(2, HEIGHT * WIDTH, DIM, requires_grad=True)


def with_gradients(found: list[Tensor], layer: nn.Module, x: Tensor) -> list[Tensor | None]:
    loss = sum((output.square().sum() for output in found), torch.zeros(()))
    # the gradient of the bias of keys is zero, and rounding where it is computed
    names = [n for n, p in layer.named_parameters() if p.requires_grad and "keys.bias" not in n]
    leaves = [x, *(dict(layer.named_parameters())[n] for n in names)]
    return [*found, *torch.autograd.grad(loss, leaves, allow_unused=True)]


def check(layer: nn.Module, x: Tensor) -> None:
    """Outputs and every gradient are those of calls of the submodules."""
    found, expected = (with_gradients(f(layer, x), layer, x) for f in (outputs, written_out))
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "path", "tool"), EVERY_CALL)
def test_a_submodule_is_called(name: str, path: str, tool: str) -> None:
    layer, x = layer_and_tokens(name)
    before = outputs(layer, x)[0]
    attached = CALLS[tool](layer, path)
    check(layer, x)
    if attached.changes_output:
        if path.rpartition(".")[2] == "keys" and tool != "forward_pre_hook":
            assert not torch.allclose(outputs(layer, x)[1], outputs(LAYERS[name](), x)[1])
        else:
            assert not torch.allclose(outputs(layer, x)[0], before, atol=1e-3)
    if attached.seen is not None:
        attached.seen.clear()
        outputs(layer, x)[0].sum().backward()
        assert len(attached.seen) == 1
    if attached.remove is not None:
        attached.remove()
        torch.testing.assert_close(outputs(layer, x)[0], before)
        assert name == "block_mlp" or layer.explain().fused  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "path", "tool"), EVERY_WEIGHT)
def test_parameters_are_made_by_the_call(name: str, path: str, tool: str) -> None:
    layer, x = layer_and_tokens(name)
    before = outputs(layer, x)
    attached = WEIGHTS[tool](layer, path)
    check(layer, x)
    of_context = path.rpartition(".")[2] == "keys"  # their bias has no effect at all
    if not (of_context and tool == "parametrized_bias"):
        at = 1 if of_context else 0
        assert not torch.allclose(outputs(layer, x)[at], before[at], rtol=0, atol=1e-4)
    if attached.remove is not None:
        attached.remove()
        assert name == "block_mlp" or layer.explain().fused  # type: ignore[operator]
        check(layer, x)


def test_two_submodules_at_once() -> None:
    layer, x = layer_and_tokens("block")
    CALLS["wrapped"](layer, "mlp.fc1")
    CALLS["forward_hook"](layer, "norm1")
    WEIGHTS["pruned"](layer, "attn.keys")
    WEIGHTS["old_weight_norm"](layer, "mlp.dwconv.dwconv")
    check(layer, x)


@pytest.mark.parametrize("name", LAYERS)
def test_a_plain_layer_is_fused(name: str) -> None:
    """And computes what calls of its submodules compute."""
    layer, x = layer_and_tokens(name)
    check(layer, x)
    assert layer.explain().fused == (name != "block_mlp")  # type: ignore[operator]
    check(copy.deepcopy(layer), x)


GLOBAL_HOOKS = {
    "forward": lambda: modules.register_module_forward_hook(
        lambda module, inputs, output: 2 * output if isinstance(module, nn.Linear | nn.Conv2d) else None
    ),
    "forward_pre": lambda: modules.register_module_forward_pre_hook(
        lambda module, inputs: (2 * inputs[0],) if isinstance(module, nn.LayerNorm | nn.Conv2d) else None
    ),
}


@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
@pytest.mark.parametrize("name", LAYERS)
def test_hooks_for_all_modules(name: str, kind: str) -> None:
    layer, x = layer_and_tokens(name)
    handle = GLOBAL_HOOKS[kind]()
    try:
        check(layer, x)
        assert "hooks for all modules" in str(layer.explain())  # type: ignore[operator]
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["mix_ffn_skip", "attention", "block"])
def test_backward_hooks_for_all_modules(name: str) -> None:
    layer, x = layer_and_tokens(name)
    for register in (modules.register_module_full_backward_hook, modules.register_module_full_backward_pre_hook):
        seen: list[nn.Module] = []
        handle = register(lambda module, *_, seen=seen: seen.append(module))
        try:
            outputs(layer, x)[0].sum().backward()
        finally:
            handle.remove()
        assert {id(m) for m in seen} == {id(m) for m in layer.modules()}


def test_a_forward_replaced_for_the_whole_class(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_and_tokens("block")
    for built, name in (
        *((built, "forward") for built in (nn.Linear, nn.Conv2d, nn.LayerNorm, DepthwiseConv)),
        (nn.Conv2d, "_conv_forward"),
    ):
        forward = getattr(built, name)
        monkeypatch.setattr(built, name, lambda *arguments, forward=forward: 2 * forward(*arguments))
        check(layer, x)
        assert "has another forward" in str(layer.explain())  # type: ignore[operator]
        monkeypatch.undo()


CONVOLUTIONS = {
    "dilated": lambda n: nn.Conv2d(n, n, 3, padding=2, dilation=2, groups=n),
    "reflecting": lambda n: nn.Conv2d(n, n, 3, padding=1, padding_mode="reflect", groups=n),
    "large": lambda n: nn.Conv2d(n, n, 5, padding=2, groups=n),
    "too_large": lambda n: nn.Conv2d(n, n, 9, padding=4, groups=n),
    "oblong": lambda n: nn.Conv2d(n, n, (5, 3), padding=(2, 1), groups=n),
    "dense": lambda n: nn.Conv2d(n, n, 3, padding=1),
    "grouped": lambda n: nn.Conv2d(n, n, 3, padding=1, groups=n // 2),
    "same": lambda n: nn.Conv2d(n, n, 3, padding="same", groups=n),
    "without_bias": lambda n: nn.Conv2d(n, n, 3, padding=1, groups=n, bias=False),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("name", ["mix_ffn", "mix_ffn_skip"])
def test_another_convolution(name: str, kind: str) -> None:
    layer, x = layer_and_tokens(name)
    place(layer, "dwconv.dwconv", CONVOLUTIONS[kind](12))
    check(layer, x)
    assert layer.explain().fused == (kind in ("large", "without_bias"))  # type: ignore[operator]


@pytest.mark.parametrize("options", [{"stride": 2}, {"dilation": 2}])
def test_a_convolution_that_gives_another_size_is_an_error(options: dict[str, Any]) -> None:
    """Rather than a layer that takes its weight for that of the plain one."""
    layer, x = layer_and_tokens("mix_ffn_skip")
    place(layer, "dwconv.dwconv", nn.Conv2d(12, 12, 3, padding=1, groups=12, **options))
    with pytest.raises(RuntimeError, match="must match the size"):
        layer(x, HEIGHT, WIDTH)


@pytest.mark.parametrize("path", ["queries", "keys", "values", "reprojection"])
def test_another_projection_sees_the_image(path: str) -> None:
    """Also in a block, where the attention gets tokens."""
    for make in (
        lambda: nn.Conv2d(DIM, DIM, 3, padding=1),
        lambda: nn.Conv2d(DIM, DIM, 1, groups=2),
        lambda: nn.Conv2d(DIM, DIM, 1, bias=False),
        lambda: nn.Sequential(nn.Conv2d(DIM, DIM, 1), nn.AvgPool2d(3, 1, 1)),
    ):
        block, x = layer_and_tokens("block")
        attention = block.attn
        place(attention, path, make())
        image = x.transpose(1, 2).unflatten(2, (HEIGHT, WIDTH))
        expected, context = written_out(attention, x)
        for memory in (torch.contiguous_format, torch.channels_last):
            found = attention(image.contiguous(memory_format=memory))
            torch.testing.assert_close(found[0].flatten(2).transpose(1, 2), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found[1], context, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            block(x, HEIGHT, WIDTH)[1], written_out(attention, block.norm1(x))[1], rtol=1e-4, atol=1e-5
        )


def test_another_norm() -> None:
    for norm in (nn.RMSNorm(DIM), nn.Identity(), nn.GroupNorm(1, HEIGHT * WIDTH), nn.LayerNorm(DIM, bias=False)):
        for path in ("norm1", "norm2"):
            layer, x = layer_and_tokens("block")
            place(layer, path, norm)
            check(layer, x)
            assert layer.explain().parts["attn" if path == "norm1" else "mlp"].fused  # type: ignore[operator]
    bare = nn.LayerNorm(12, elementwise_affine=False)
    for norm in (nn.RMSNorm(12), nn.Identity(), bare, nn.LayerNorm(12, bias=False)):
        for name in ("mix_ffn", "mix_ffn_skip"):
            layer, x = layer_and_tokens(name)
            layer.norm1 = norm
            check(layer, x)
    layer, x = layer_and_tokens("mix_ffn_skip")
    layer.norm1 = None
    check(layer, x)


def test_published_depthwise_convolution_in_place_of_the_layers_own() -> None:
    class DWConv(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.dwconv = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels)

        def forward(self, x: Tensor, height: int, width: int) -> Tensor:
            image = x.transpose(1, 2).reshape(x.shape[0], -1, height, width)
            return self.dwconv(image).flatten(2).transpose(1, 2)

    layer, x = layer_and_tokens("mix_ffn_skip")
    layer.dwconv = DWConv(12)
    check(layer, x)
    assert layer.explain().reasons == {"dwconv": f"is a DWConv, not a {DepthwiseConv.__name__}"}  # type: ignore[operator]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_options_where_submodules_are_called(mask: bool, residual: bool) -> None:
    """Norm, residual and mask, also of an image; against the fused layer, for a hook that changes nothing."""
    keep = torch.rand(2, HEIGHT * WIDTH) > 0.3 if mask else None
    for norm in (None, nn.LayerNorm(DIM, eps=0.1)):
        layer, x = layer_and_tokens("attention")
        image = x.transpose(1, 2).unflatten(2, (HEIGHT, WIDTH))
        expected = layer(x, norm=norm, residual=residual, mask=keep)
        for hooked in (layer.keys, norm):
            if hooked is None:
                continue
            handle = hooked.register_forward_hook(lambda *_: None)
            found = layer(x, norm=norm, residual=residual, mask=keep)
            of_image, context = layer(image, norm=norm, residual=residual, mask=keep)
            handle.remove()
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close((of_image.flatten(2).transpose(1, 2), context), expected)
        layer, x = layer_and_tokens("mix_ffn")
        expected = layer(x, HEIGHT, WIDTH, norm=norm, residual=residual)
        for hooked in (layer.fc2, norm):
            if hooked is not None:
                handle = hooked.register_forward_hook(lambda *_: None)
                torch.testing.assert_close(layer(x, HEIGHT, WIDTH, norm=norm, residual=residual), expected)
                handle.remove()


@pytest.mark.parametrize("shape", [(0, 12), (2, 0)], ids=["no_images", "no_tokens"])
def test_empty_input_of_called_submodules_gives_zero_gradients(shape: tuple[int, int]) -> None:
    layer, _ = layer_and_tokens("block")
    for path in ("mlp.fc1", "mlp.dwconv.dwconv", "attn.queries", "attn.reprojection"):
        place(layer, path, Adapter(layer.get_submodule(path)))
    output, context = layer(torch.randn(*shape, DIM), 3 if shape[1] else 0, 4)
    assert output.shape == (*shape, DIM)
    (output.sum() + context.sum()).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_errors_of_called_submodules_are_those_of_the_operators() -> None:
    layer, x = layer_and_tokens("mix_ffn")
    layer.fc1.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="x: has 12 tokens, expected height"):
        layer(x, 3, 5)
    layer, x = layer_and_tokens("attention")
    layer.keys.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"x: expected \[B, N, C\]"):
        layer(x[0])


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantization() -> None:
    for name in ("block", "block_mlp", "mix_ffn_skip"):
        layer, x = layer_and_tokens(name)
        quantized = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear})
        with torch.no_grad():
            torch.testing.assert_close(outputs(quantized, x)[0], outputs(layer, x)[0], rtol=0.2, atol=0.4)
            assert not torch.equal(outputs(quantized, x)[0], outputs(layer, x)[0])


def test_parameters_that_a_call_swaps_in_stay_fused() -> None:
    """Plain tensors, as `torch.func.functional_call` puts them there."""
    layer, x = layer_and_tokens("block")
    other = {name: 1.5 * p.detach() for name, p in layer.named_parameters()}
    found = torch.func.functional_call(layer, other, (x, HEIGHT, WIDTH))
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(other[name])
    torch.testing.assert_close(found, layer(x, HEIGHT, WIDTH))


CHANGES = {
    **{tool: ("mlp.fc1", CALLS[tool]) for tool in ("wrapped", "forward_hook", "forward_pre_hook", "own_forward")},
    "hook_of_convolution": ("mlp.dwconv.dwconv", CALLS["forward_hook"]),
    "hook_of_holder": ("mlp.dwconv", CALLS["forward_hook"]),
    "hook_of_norm": ("norm2", CALLS["forward_hook"]),
    "hook_of_projection": ("attn.values", CALLS["forward_hook"]),
    "hook_of_attention": ("attn", CALLS["forward_hook"]),
    **{tool: ("mlp.fc2", WEIGHTS[tool]) for tool in ("parametrized", "old_weight_norm", "pruned")},
    "hook_for_all": ("", lambda model, path: GLOBAL_HOOKS["forward"]()),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", CHANGES)
def test_a_compiled_layer_notices(change: str) -> None:
    """Without a graph break, there and back."""
    torch._dynamo.reset()
    layer, x = layer_and_tokens("block")
    graphs = []

    def record(module: torch.fx.GraphModule, inputs: object) -> Any:
        graphs.append(module)
        return module.forward

    compiled = torch.compile(layer, fullgraph=True, backend=record)
    before = compiled(x, HEIGHT, WIDTH)
    torch.testing.assert_close(before, layer(x, HEIGHT, WIDTH))
    path, attach = CHANGES[change]
    attached = attach(layer, path)
    expected = layer(x, HEIGHT, WIDTH)
    found = compiled(x, HEIGHT, WIDTH)
    if attached.remove is not None:
        attached.remove()
    assert len(graphs) == 2
    if change != "hook_for_all":  # which runs at the compiled module, too
        torch.testing.assert_close(found, expected)
        assert not torch.allclose(found[0], before[0], atol=1e-3)
    torch.testing.assert_close(compiled(x, HEIGHT, WIDTH), layer(x, HEIGHT, WIDTH))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_layer_has_its_adapter(strict: bool) -> None:
    layer, x = layer_and_tokens("block")
    place(layer, "mlp.fc1", Adapter(layer.mlp.fc1))
    program = torch.export.export(layer.eval(), (x.detach(), HEIGHT, WIDTH), strict=strict)
    torch.testing.assert_close(program.module()(x.detach(), HEIGHT, WIDTH), layer(x, HEIGHT, WIDTH))
    assert "mlp.fc1.scale" in dict(program.named_parameters())


def test_explanations() -> None:
    block, _ = layer_and_tokens("block")
    block.attn.keys.register_forward_hook(lambda *_: None)
    block.norm2.register_forward_hook(lambda *_: None)
    with kernels.use_backend("reference"):
        found = block.explain()
    assert not found.fused
    assert found.parts["attn"].reasons == {"keys": "has hooks"}
    assert list(found.parts["attn"].operators) == ["efficient_attention"]
    assert found.parts["mlp"].fused
    assert found.parts["mlp"].reasons == {"norm": "has hooks"}
    assert found.parts["mlp"].operators["mix_ffn"].chosen == "reference"
    assert str(found).splitlines() == [
        "EfficientTransformerBlock: not fused, its submodules are called",
        "  attn: EfficientAttention: not fused, its submodules are called",
        "    keys: has hooks",
        "    efficient_attention, cpu, float32: reference (chosen by use_backend)",
        "  mlp: MixFFNSkip: fused",
        "    norm: has hooks",
        "    mix_ffn, cpu, float32: reference (chosen by use_backend)",
    ]
    assert block.attn.explain("cpu", torch.float16).operators["efficient_attention"].dtype == torch.float16
    place(block, "mlp", nn.Identity())
    assert block.explain().parts["mlp"].reasons == {"mlp": "is a Identity, not a MixFFN"}
    assert kernels.TokenLinear(3, 4).explain().fused
    linear = kernels.TokenLinear(3, 4)
    WEIGHTS["narrow_weight"](nn.Sequential(linear), "0")
    assert linear.explain().reasons == {"parameters": "has a parameter of type Stored"}


def test_the_explanation_knows_what_limits_a_backend() -> None:
    require("triton")
    with kernels.use_backend("triton"):
        small, large = (kernels.MixFFN(4, 8, kernel_size=k).explain().operators["mix_ffn"] for k in (3, 5))
    assert small.chosen == "triton"
    assert large.chosen is None
    assert "dw_weight is 5x5" in large.rule
