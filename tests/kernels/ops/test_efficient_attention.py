"""Efficient attention on query, key and value."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import msformer_kernels as kernels
from tests.kernels.cases import Case, attention_case, cast, require, run
from tests.kernels.cases.base import strided
from tests.kernels.cases.efficient_attention import CASES
from tests.kernels.ops.shared import DTYPES, OperatorTests, check_error_rule


class TestEfficientAttention(OperatorTests):
    OPERATOR = "efficient_attention"
    CASES = CASES


@pytest.mark.accuracy
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(
    ("case", "environment"),
    [
        (CASES["tiles"], {"MSFORMER_EMULATE_SHARED_KB": "50"}),
        (CASES["tiles"], {"MSFORMER_EMULATE_PROCESSORS": "16"}),
        (
            attention_case(
                "wide",
                query_tokens=70,
                tokens=90,
                key_channels=200,
                value_channels=70,
                mask="random",
                query_scale=0.7,
                key_scale=1.4,
                output_scale=0.3,
            ),
            {"MSFORMER_EMULATE_SHARED_KB": "72"},
        ),
        (attention_case("wide_value", tokens=66, key_channels=20, value_channels=150, layout="transposed"), {}),
        (attention_case("wide_plain", key_channels=130, normalize_query=False, normalization="scaling"), {}),
        (attention_case("one_tile", key_scale=2.0), {}),
    ],
    ids=["little_memory", "many_processors", "wide", "wide_value", "wide_plain", "one_tile"],
)
def test_every_form_of_the_cuda_kernels(
    case: Case, environment: dict[str, str], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contexts that do not fit on the chip as a whole, and sums over many splits of the tokens."""
    require("cuda")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check_error_rule(case, dtype, "cuda", most=3)


def test_efficient_attention_by_hand() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 1).double()
    context, expected = [], []
    for j in range(2):
        weights = [math.exp(k[n, j]) for n in range(4)]
        context.append(sum(w * v[n, 0].item() for n, w in enumerate(weights)) / sum(weights))
    for i in range(3):
        weights = [math.exp(q[i, j]) for j in range(2)]
        expected.append(sum(w * c for w, c in zip(weights, context, strict=True)) / sum(weights))
    output, found = kernels.efficient_attention(q[None, None], k[None, None], v[None, None], backend="reference")
    assert found.flatten().tolist() == pytest.approx(context)
    assert output.flatten().tolist() == pytest.approx(expected)


def test_scaling_normalization_is_linear_attention_over_n() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 6, 4, dtype=torch.float64) for _ in range(3))
    output, _ = kernels.efficient_attention(q, k, v, normalization="scaling", backend="reference")
    torch.testing.assert_close(output, q @ k.transpose(-1, -2) @ v / 6)


def test_relu_attention_by_hand() -> None:
    """As EfficientViT and SANA write it: a further feature of ones sums the keys."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 6, 4, dtype=torch.float64) for _ in range(3))
    with_ones = torch.nn.functional.pad(v, (0, 1), value=1.0)
    expected = q.relu() @ (k.relu().transpose(-1, -2) @ with_ones)
    expected = expected[..., :-1] / (expected[..., -1:] + 1e-5)
    output, context = kernels.efficient_attention(q, k, v, normalization="relu", eps=1e-5, backend="reference")
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(context, k.relu().transpose(-1, -2) @ v)
    plain, _ = kernels.efficient_attention(q, k, v, normalization="relu", normalize_query=False, backend="reference")
    torch.testing.assert_close(plain, q.relu() @ context)


@pytest.mark.parametrize("name", ["relu_rows", "relu_columns", "relu_plain"])
def test_gradients_of_relu_attention(name: str, float64_backend: str) -> None:
    tensors = cast(CASES[name].draw(), torch.float64)
    names = [n for n, x in tensors.items() if x is not None and x.requires_grad]

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        return CASES[name].call(tensors | dict(zip(names, leaves, strict=True)), float64_backend)

    assert torch.autograd.gradcheck(call, [tensors[n] for n in names], fast_mode=True, eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("backend_name", ["reference", "native"])
def test_relu_of_nothing_positive_gives_zeros_and_finite_gradients(backend_name: str, layout: str) -> None:
    """A query without positive features is divided by eps alone; so is every one where no key has any."""
    require(backend_name)
    torch.manual_seed(0)
    q, k, v = (strided(torch.randn(1, 2, 5, 3), layout) for _ in range(3))
    for keys in (k, -k.abs()):
        leaves = [x.clone().requires_grad_() for x in (q, keys, v)]
        with torch.no_grad():
            leaves[0][:, :, 2].abs_().neg_()
            leaves[0][:, :, 3] = 0
        output, _ = kernels.efficient_attention(*leaves, normalization="relu", backend=backend_name)
        assert not output[:, :, 2:4].any()
        assert output[:, :, 0].any() == (keys is k)
        gradients = torch.autograd.grad(output.sum(), leaves)
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert not gradients[0][:, :, 2:4].any()


def test_the_kernels_of_a_gpu_have_no_relu_attention() -> None:
    for name in ("cuda", "triton"):
        require(name)
        with pytest.raises(kernels.BackendError, match="no kernels for normalization 'relu'"):
            attention(normalization="relu", backend=name)


@pytest.mark.parametrize("normalization", ["softmax", "scaling", "relu"])
def test_masking_equals_removing(normalization: str) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 5, 3), torch.randn(1, 2, 7, 3), torch.randn(1, 2, 7, 4)
    keep = torch.tensor([[True, False, True, True, False, True, False]])
    masked = kernels.efficient_attention(q, k, v, mask=keep, normalization=normalization, backend="reference")
    removed = kernels.efficient_attention(
        q, k[:, :, keep[0]], v[:, :, keep[0]], normalization=normalization, backend="reference"
    )
    torch.testing.assert_close(masked, removed)


@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize("backend_name", ["reference", "native", "cuda"])
def test_masked_tokens_may_hold_anything(name: str, backend_name: str) -> None:
    require(backend_name)
    case = attention_case("", batch=2, heads=2, mask="random")
    tensors = case.draw()
    clean = run(case, cast(tensors, torch.float32), backend_name)
    x, mask = tensors[name], tensors["mask"]
    assert x is not None
    assert mask is not None
    x.transpose(1, 2)[~mask] = float("nan")
    dirty = run(case, cast(tensors, torch.float32), backend_name)
    for key in clean:
        torch.testing.assert_close(dirty[key], clean[key], rtol=0, atol=0)


@pytest.mark.parametrize("backend_name", ["reference", "native", "cuda", "triton"])
@pytest.mark.parametrize("image", [False, True])
def test_masked_keys_and_values_have_no_gradient_beside_nan(backend_name: str, image: bool) -> None:
    """Of other tokens, in a query."""
    require(backend_name)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 9, 4) for _ in range(3))
    if image:  # channels first
        q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
    k.requires_grad_()
    v.requires_grad_()
    q[0, 0, 2, 1] = math.nan
    keep = torch.arange(9) > 4
    output, _ = kernels.efficient_attention(q, k, v, mask=keep.expand(2, -1), backend=backend_name)
    for gradient in torch.autograd.grad(output.sum(), (k, v)):
        assert gradient[0, 0, 5:].isnan().any()
        assert not gradient[:, :, :5].any()


@pytest.mark.parametrize("normalization", ["softmax", "scaling", "relu"])
def test_memory_equals_tokens_in_front(normalization: str) -> None:
    """The same for every image, never masked."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 6)
    memory_key, memory_value = torch.randn(3, 2, 4), torch.randn(3, 2, 6)
    mask = torch.tensor([[True, False, True, True, False, True, False], [False] * 7])
    options = {"normalization": normalization, "backend": "reference"}
    found = kernels.efficient_attention(q, k, v, mask=mask, memory_key=memory_key, memory_value=memory_value, **options)
    for i in range(2):
        key, value = (
            torch.cat((m[None], x[i : i + 1, :, mask[i]]), 2) for m, x in ((memory_key, k), (memory_value, v))
        )
        expected = kernels.efficient_attention(q[i : i + 1], key, value, **options)
        torch.testing.assert_close([x[i : i + 1] for x in found], list(expected))


def test_memory_of_float32_beside_bfloat16(backend: str) -> None:
    """As a parameter is, beside what autocast makes."""
    tensors = cast(CASES["memory"].draw(), torch.bfloat16)
    names = ("memory_key", "memory_value")
    tensors |= {n: x.detach().float().requires_grad_() for n, x in tensors.items() if n in names and x is not None}
    found, expected = (run(CASES["memory"], tensors, name) for name in (backend, "reference"))
    assert all(found[f"grad_{name}"].dtype == torch.float32 for name in names)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, atol=2e-2, rtol=2e-2)


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


def test_large_logits_do_not_overflow(backend: str) -> None:
    q, k, v = (torch.randn(1, 1, 50, 4) * 1e4 for _ in range(3))
    output, context = kernels.efficient_attention(q, k, v, backend=backend)
    expected, expected_context = kernels.efficient_attention(q, k, v, backend="reference")
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(context, expected_context)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_infinity_in_a_query_without_softmax_gives_infinity(dtype: str, backend: str) -> None:
    """Whatever the parts are in which tensor cores take the context."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 9, 4).to(DTYPES[dtype]) for _ in range(3))
    q[0, 0, 2, 1] = float("inf")
    output, _ = kernels.efficient_attention(q, k, v, normalize_query=False, backend=backend)
    expected, _ = kernels.efficient_attention(q, k, v, normalize_query=False, backend="reference")
    assert expected[0, 0, 2].isinf().all()
    assert torch.equal(output[0, 0, 2], expected[0, 0, 2])


def test_a_feature_of_infinitely_small_logits_gives_nan_as_in_pytorch(backend: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 9, 4) for _ in range(3))
    k[..., 1] = float("-inf")
    _, context = kernels.efficient_attention(q, k, v, backend=backend)
    _, expected = kernels.efficient_attention(q, k, v, backend="reference")
    torch.testing.assert_close(context, expected, equal_nan=True)
    assert context[:, :, 1].isnan().all()


@pytest.mark.parametrize("name", ["transposed", "sliced", "expanded", "one"])
def test_output_and_gradients_lie_in_memory_as_the_inputs_do(name: str, backend: str) -> None:
    """Images with channels first need no copies around the operator; a graph expects the same layout."""
    tensors = cast(CASES[name].draw(), torch.float32)
    q, k, v = (tensors[n] for n in ("query", "key", "value"))
    assert q is not None
    assert k is not None
    assert v is not None
    output, _ = kernels.efficient_attention(q, k, v, backend=backend)
    for found, like in zip((output, *torch.autograd.grad(output.sum(), (q, k, v))), (q, q, k, v), strict=True):
        if name == "transposed":
            assert found.transpose(-1, -2).is_contiguous()
            assert like.transpose(-1, -2).is_contiguous()
        else:
            assert found.is_contiguous()


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


@pytest.mark.accuracy
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_key_gradient_where_one_token_has_nearly_all_the_weight(dtype: str) -> None:
    """Then the gradients of all weights nearly cancel, and so must the errors of what they are made of."""
    require("cuda")
    check_error_rule(attention_case("peaked", tokens=150, key_scale=40.0), dtype, "cuda", most=3)


@pytest.mark.parametrize("channels", [6, 130])
def test_one_kept_token_of_many_gets_exactly_no_key_gradient(channels: int) -> None:
    """Where delta comes from another kernel than the product from which it is subtracted."""
    require("cuda")
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 150, channels, requires_grad=True) for _ in range(3))
    mask = torch.arange(150)[None] == 70
    output, context = kernels.efficient_attention(q, k, v, mask=mask, backend="cuda")
    (gradient,) = torch.autograd.grad((output * torch.randn_like(output)).sum() + context.square().sum(), k)
    assert not gradient.any()


@pytest.mark.parametrize("channels", [6, 130])
def test_masked_tokens_get_no_gradient_whatever_comes_in(channels: int) -> None:
    require("cuda")
    q, k, v = (torch.randn(1, 1, 9, channels, requires_grad=True) for _ in range(3))
    mask = torch.arange(9)[None] % 2 == 0
    output, _ = kernels.efficient_attention(q, k, v, mask=mask, backend="cuda")
    for gradient in torch.autograd.grad(output, (k, v), torch.full_like(output, float("inf"))):
        assert not gradient[:, :, 1::2].any()
        assert not gradient[:, :, ::2].isfinite().all()


meta = torch.device("meta")


def attention(**changes: Any) -> None:
    arguments: dict[str, Any] = {
        "query": torch.randn(2, 3, 5, 4),
        "key": torch.randn(2, 3, 7, 4),
        "value": torch.randn(2, 3, 7, 6),
    }
    kernels.efficient_attention(**(arguments | changes))


BAD_ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"query": torch.randn(3, 5, 4)},
        ValueError,
        r"query: expected \[B, heads, Nq, Dk\], got shape \(3, 5, 4\)",
    ),
    ({"key": torch.randn(2, 3, 7, 5)}, ValueError, r"key: expected .* = \(2, 3, 7, 4\), got \(2, 3, 7, 5\)"),
    ({"value": torch.randn(2, 3, 8, 6)}, ValueError, r"value: expected .* = \(2, 3, 7, 6\), got"),
    ({"value": torch.randn(2, 1, 7, 6)}, ValueError, r"value: expected"),
    ({"key": torch.randn(2, 3, 7, 4).double()}, TypeError, "key: has dtype torch.float64, but query has"),
    ({"query": torch.ones(2, 3, 5, 4, dtype=torch.int64)}, TypeError, "query: expected a floating-point"),
    ({"value": torch.randn(2, 3, 7, 6, device=meta)}, ValueError, "value: is on meta, but query is on cpu"),
    ({"mask": torch.ones(2, 7)}, TypeError, "mask: expected a boolean tensor .* got torch.float32"),
    ({"mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError, r"mask: expected \[B, N\] = \(2, 7\), got"),
    ({"memory_key": torch.randn(3, 2, 4)}, ValueError, "memory_value: expected a tensor beside memory_key, got None"),
    (
        {"memory_key": torch.randn(3, 2, 4), "memory_value": torch.randn(3, 3, 6)},
        ValueError,
        r"memory_value: expected \[heads, M, Dv\] of one head = \(3, 2, 6\), got \(3, 3, 6\)",
    ),
    ({"normalization": "l2"}, ValueError, "normalization: expected one of softmax, scaling, relu, got 'l2'"),
    ({"normalization": "relu", "eps": 0.0}, ValueError, "eps: expected at least 1e-30 with normalization 'relu', got"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_ARGUMENTS)
def test_bad_argument(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    """The error names the argument, what came and what was expected."""
    attention()
    with pytest.raises(error, match=message):
        attention(**changes)
