"""Checkpoints of other implementations load into our layers."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

import msformer_kernels as kernels

NAMES = {
    "transformers 4": {"fc1": "dense1", "fc2": "dense2"},
    "transformers 5": {},
    "timm": {"dwconv.dwconv": "dwconv"},
}


def renamed(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    def rename(key: str) -> str:
        layer, _, part = key.rpartition(".")
        return f"{names.get(layer, layer)}.{part}"

    return {rename(key): value for key, value in state.items()}


@pytest.mark.parametrize("library", list(NAMES))
def test_names_of_other_libraries(library: str) -> None:
    torch.manual_seed(0)
    theirs, ours = kernels.MixFFN(6, 12), kernels.MixFFN(6, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.load_state_dict(renamed(theirs.state_dict(), NAMES[library]))
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_within_a_model_and_after_copies() -> None:
    torch.manual_seed(0)
    theirs = torch.nn.ModuleDict({"a": kernels.MixFFN(4, 8), "b": kernels.MixFFN(4, 8)})
    state = {}
    for name, layer in theirs.items():
        state |= {f"{name}.{k}": v for k, v in renamed(layer.state_dict(), NAMES["transformers 4"]).items()}
    fresh = torch.nn.ModuleDict({"a": kernels.MixFFN(4, 8), "b": kernels.MixFFN(4, 8)})
    for ours in (copy.deepcopy(fresh), pickle.loads(pickle.dumps(fresh))):
        ours.load_state_dict(state)
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name


def test_norms_that_are_never_used_are_named_and_left_out() -> None:
    torch.manual_seed(0)
    theirs, ours = kernels.MixFFNSkip(4, 8), kernels.MixFFNSkip(4, 8)
    unused = {f"{name}.{part}": torch.ones(8) for name in ("norm2", "norm3") for part in ("weight", "bias")}
    with pytest.warns(UserWarning, match=r"norm2\.weight, norm2\.bias, norm3\.weight, norm3\.bias: not loaded"):
        ours.load_state_dict(theirs.state_dict() | unused)
    assert torch.equal(ours.norm1.weight, theirs.norm1.weight)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*norm2\.weight"):
        kernels.MixFFN(4, 8).load_state_dict(kernels.MixFFN(4, 8).state_dict() | unused)


def test_what_does_not_fit_is_refused() -> None:
    state = kernels.MixFFN(4, 8).state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for fc1\.weight"):
        kernels.MixFFN(4, 8).load_state_dict(state | {"fc1.weight": torch.zeros(4, 8)})
    with pytest.raises(RuntimeError, match=r"size mismatch for fc1\.weight"):
        kernels.MixFFN(4, 8).load_state_dict(state | {"fc1.weight": torch.zeros(8, 4, 3, 3)})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        kernels.MixFFN(4, 8).load_state_dict(state | {"dense3.weight": torch.zeros(4, 8)})


def test_linear_layers_and_convolutions_for_one_another() -> None:
    torch.manual_seed(0)
    mlp, attention = kernels.MixFFN(4, 8), kernels.EfficientAttention(4)
    as_convolutions = {k: v[..., None, None] if v.dim() == 2 else v for k, v in mlp.state_dict().items()}
    as_linear = {k: v.flatten(1) if v.dim() == 4 else v for k, v in attention.state_dict().items()}
    for layer, state in ((kernels.MixFFN(4, 8), as_convolutions), (kernels.EfficientAttention(4), as_linear)):
        layer.load_state_dict(state)
    other = kernels.MixFFN(4, 8)
    other.load_state_dict(as_convolutions)
    x = torch.randn(1, 6, 4)
    assert torch.equal(other(x, 2, 3), mlp(x, 2, 3))


def test_a_linear_layer_of_tokens_takes_a_convolution() -> None:
    layer, weight = kernels.TokenLinear(4, 3), torch.randn(3, 4)
    layer.load_state_dict({"weight": weight[..., None, None], "bias": torch.zeros(3)})
    assert torch.equal(layer.weight, weight)


class Flat(nn.Conv2d):
    """A convolution of tokens with parameters of its own."""

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:  # type: ignore[override]
        return super().forward(x.transpose(1, 2).unflatten(2, (height, width))).flatten(2).transpose(1, 2)


def test_a_submodule_with_the_name_of_another_library_keeps_it() -> None:
    mlp = kernels.MixFFNSkip(4, 8)
    mlp.dwconv = Flat(8, 8, 3, padding=1, groups=8)  # type: ignore[assignment]
    mlp.norm2 = nn.LayerNorm(4)
    other = copy.deepcopy(mlp).requires_grad_(False)
    for parameter in other.parameters():
        parameter.fill_(7)
    other.load_state_dict(mlp.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(mlp.parameters(), other.parameters(), strict=True))


def test_two_names_for_one_tensor_are_refused() -> None:
    mlp = kernels.MixFFN(4, 8)
    state = {**mlp.state_dict(), "dense1.weight": torch.zeros(8, 4)}
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"dense1\.weight"'):
        mlp.load_state_dict(state)


def test_weights_of_convolutions_are_arguments_of_the_operators() -> None:
    torch.manual_seed(0)
    mlp, attention = kernels.MixFFN(4, 8), kernels.EfficientAttention(4)
    x = torch.randn(1, 6, 4)
    fc1, fc2 = (w[..., None, None].detach().requires_grad_() for w in (mlp.fc1.weight, mlp.fc2.weight))
    taps = mlp.dwconv.dwconv
    found = kernels.mix_ffn(x, 2, 3, fc1, mlp.fc1.bias, taps.weight, taps.bias, fc2_weight=fc2, fc2_bias=mlp.fc2.bias)
    assert torch.equal(found, mlp(x, 2, 3))
    assert torch.equal(found, mlp(x, (2, 3)))
    assert [g.shape for g in torch.autograd.grad(found.sum(), (fc1, fc2))] == [fc1.shape, fc2.shape]
    layers = (attention.queries, attention.keys, attention.values, attention.reprojection)
    output, _ = kernels.efficient_self_attention(x, *(t for layer in layers for t in (layer.weight, layer.bias)))
    assert torch.equal(output, attention(x)[0])
    with pytest.raises(ValueError, match=r"fc1_weight: expected .* got \(8, 4, 3, 3\)"):
        kernels.mix_ffn(x, 2, 3, torch.zeros(8, 4, 3, 3), None, taps.weight, None, fc2, None)
    for size in ((2,), ((2, 3), 3), ((2, 3, 1),)):
        with pytest.raises(TypeError, match="expected two numbers or one pair, got"):
            mlp(x, *size)
    for size in ((2.0, 3), ("2", "3"), ((2, 3.0),)):
        with pytest.raises(TypeError, match=r"(height|width): expected a whole number, got '?[23]"):
            mlp(x, *size)
