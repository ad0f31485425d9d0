"""NaN, infinity, masked garbage, and inputs that must stay as they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import msformer_kernels as kernels
from tests.kernels.cases import SMALL, Case, attention_case, cast, mix_ffn_case, require, run, self_attention_case

DIFFERENT = [
    attention_case("", batch=2, heads=2),
    attention_case("scaling", batch=2, normalization="scaling"),
    self_attention_case("", heads=2),
    self_attention_case("bare", norm=False, residual=False),
    mix_ffn_case("", batch=2),
    mix_ffn_case("relu", batch=2, activation="relu", norm=False, hidden_norm=False),
    mix_ffn_case("tanh", batch=2, activation="gelu_tanh", skip=False, hidden_norm=False),
]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("case", DIFFERENT, ids=str)
def test_nan_and_infinity_come_out_where_they_would_in_pytorch(case: Case, bad: float, backend: str) -> None:
    tensors = case.make()
    first = next(iter(tensors.values()))
    assert first is not None
    first[0, ..., 2, 1] = bad
    leaves = cast(tensors, torch.float32)
    expected, found = run(case, leaves, "reference"), run(case, leaves, backend)
    for name in (n for n in expected if n.startswith("output")):
        assert torch.equal(found[name].isnan(), expected[name].isnan()), name
        finite = expected[name].isfinite()
        torch.testing.assert_close(found[name][finite], expected[name][finite], rtol=1e-4, atol=1e-4)
    for name in (n for n in expected if n.startswith("grad")):
        assert name == "grad_key_bias" or not found[name][expected[name].isnan()].isfinite().any(), name


@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize("backend_name", ["reference", "native"])
def test_masked_tokens_may_hold_anything(name: str, backend_name: str) -> None:
    require(backend_name)
    case = attention_case("", batch=2, heads=2, mask="random")
    tensors = case.make()
    clean = run(case, cast(tensors, torch.float32), backend_name)
    x, mask = tensors[name], tensors["mask"]
    assert x is not None
    assert mask is not None
    x.transpose(1, 2)[~mask] = float("nan")
    dirty = run(case, cast(tensors, torch.float32), backend_name)
    for key in clean:
        torch.testing.assert_close(dirty[key], clean[key], rtol=0, atol=0)


def test_no_token_kept_gives_zeros(backend: str) -> None:
    q, k, v = (torch.randn(1, 2, 5, 3, requires_grad=True) for _ in range(3))
    mask = torch.zeros(1, 5, dtype=torch.bool)
    output, context = kernels.efficient_attention(q, k, v, mask=mask, backend=backend)
    assert not output.any()
    assert not context.any()
    for gradient in torch.autograd.grad(output.sum() + context.sum(), (q, k, v)):
        assert not gradient.any()


def test_no_token_kept_has_no_nan_on_the_way_back_either() -> None:
    """Anomaly detection, which people debug with, refuses a backward that makes a NaN and clears it later."""
    q, k, v = (torch.randn(1, 2, 5, 3, requires_grad=True) for _ in range(3))
    mask = torch.zeros(1, 5, dtype=torch.bool)
    with torch.autograd.detect_anomaly(check_nan=True):
        output, context = kernels.efficient_attention(q, k, v, mask=mask, backend="reference")
        (output.sum() + context.sum()).backward()


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


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_inputs_are_never_written(case: Case, backend: str) -> None:
    tensors = cast(case.make(), torch.float32)
    before: dict[str, Tensor] = {n: x.detach().clone() for n, x in tensors.items() if x is not None}
    versions = {n: x._version for n, x in tensors.items() if x is not None}
    run(case, tensors, backend)
    for name, x in before.items():
        now = tensors[name]
        assert now is not None
        assert torch.equal(now.detach(), x), name
        assert now._version == versions[name], name


def test_large_logits_do_not_overflow(backend: str) -> None:
    q, k, v = (torch.randn(1, 1, 50, 4) * 1e4 for _ in range(3))
    output, context = kernels.efficient_attention(q, k, v, backend=backend)
    expected, expected_context = kernels.efficient_attention(q, k, v, backend="reference")
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(context, expected_context)


@pytest.mark.parametrize("channels", [1, 6, 21])
def test_one_token_gets_exactly_no_key_gradient(channels: int, backend: str) -> None:
    """Its softmax weight is 1 whatever its key."""
    check_one_token(channels, torch.float32, backend)


@pytest.mark.parametrize("channels", [1, 6, 21])
def test_one_token_gets_exactly_no_key_gradient_in_float64(channels: int, float64_backend: str) -> None:
    check_one_token(channels, torch.float64, float64_backend)


def check_one_token(channels: int, dtype: torch.dtype, backend: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 3, channels, dtype=dtype, requires_grad=True) for _ in range(3))
    one_kept = torch.tensor([[False, True, False]]).expand(2, 3)
    cases = [(k[:, :, :1], v[:, :, :1], None), (k, v, one_kept)]
    for key, value, mask in cases:
        output, context = kernels.efficient_attention(q, key, value, mask=mask, backend=backend)
        (gradient,) = torch.autograd.grad((output * torch.randn_like(output)).sum() + context.square().sum(), k)
        assert not gradient.any()
    layer = kernels.EfficientAttention(channels).to(dtype)
    with kernels.use_backend(backend):
        layer(torch.randn(1, 1, channels, dtype=dtype))[0].square().sum().backward()
    assert layer.keys.weight.grad is not None
    assert not layer.keys.weight.grad.any()
