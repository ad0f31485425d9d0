"""Efficient self-attention, in its forms."""

from __future__ import annotations

from collections import namedtuple
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import msformer_kernels as kernels
from msformer_kernels.core.operator import OPERATORS
from msformer_kernels.core.precision import float32_products
from tests.kernels.cases import Case, cast, require, run, self_attention_case
from tests.kernels.cases.efficient_self_attention import CASES
from tests.kernels.ops.shared import OperatorTests, check_error_rule, skip_in_the_interpreter


class TestEfficientSelfAttention(OperatorTests):
    OPERATOR = "efficient_self_attention"
    CASES = CASES


class TestUnfolded:
    """The other form of the GPU backends, for wide tokens."""

    CASES = CASES

    @pytest.mark.accuracy
    @pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
    def test_error_rule(self, tiled: Case, dtype: str, unfolded_backend: str, poisoned: None) -> None:
        medium = tiled in CASES.medium
        skip_in_the_interpreter(unfolded_backend, dtype, medium)
        check_error_rule(tiled, dtype, unfolded_backend, most=3, medium=medium)


FULL = {"channels": 128, "key_channels": 128, "value_channels": 128}


@pytest.mark.accuracy
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize(
    ("case", "environment"),
    [
        (self_attention_case("full", batch=1, tokens=70, **FULL), {}),
        (self_attention_case("full", tokens=70, heads=2, mask="random", **FULL), {"MSFORMER_EMULATE_SHARED_KB": "99"}),
        (CASES["tiles"], {"MSFORMER_EMULATE_PROCESSORS": "16"}),
        (self_attention_case("odd", tokens=70, channels=33, key_channels=39, value_channels=21, heads=3), {}),
    ],
    ids=["full", "little_memory", "many_processors", "odd"],
)
def test_every_form_of_the_cuda_kernels(
    case: Case, environment: dict[str, str], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The widest matrices, on the chip as a whole and in chunks; sums over many splits; rows that are not aligned."""
    require("cuda")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check_error_rule(case, dtype, "cuda", most=2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-3), (torch.bfloat16, 2e-2)], ids=["tf32", "bf16"])
def test_cuda_with_tf32_or_wide_parameters(dtype: torch.dtype, tolerance: float) -> None:
    """As under autocast on a GPU: parameters and their gradients are float32 whatever the activations are."""
    require("cuda")
    operator = OPERATORS["efficient_self_attention"]
    calls = import_module("msformer_kernels.ops.efficient_self_attention.cuda_calls")
    tensors = {name: None if x is None else x.float() for name, x in CASES["tiles"].draw().items()}
    assert tensors["x"] is not None
    tensors["x"] = tensors["x"].to(dtype)
    options = {"num_heads": 2, "norm_eps": 1e-5, "norm_kind": "layer", "residual": True}
    call = operator.call_type(**tensors, **options, memory_key=None, memory_value=None)
    with float32_products("high"):
        output, *state = calls.forward(call)
    grads = SimpleNamespace(output=torch.randn_like(output), context=torch.randn_like(state[0]))
    with float32_products("high"):
        found = calls.backward(call, namedtuple("saved", operator.kept)(*state), grads)  # type: ignore[misc]

    exact = cast(tensors, torch.float64)
    expected = kernels.efficient_self_attention(**exact, **options, backend="reference")
    inputs = [exact[name] for name in operator.differentiable if name in exact]
    gradients = torch.autograd.grad(expected, inputs, [grads.output.double(), grads.context.double()])
    given = [tensors[name] for name in operator.differentiable if name in tensors]
    for value, truth in zip((output, state[0], *found[: len(given)]), (*expected, *gradients), strict=True):
        assert (value - truth).norm() <= tolerance * truth.norm()
    for gradient, x in zip(found, given, strict=False):
        assert x is not None
        assert gradient.dtype == x.dtype


def test_a_feature_of_infinitely_small_logits_gives_nan_as_in_pytorch() -> None:
    """Unlike an image where no token is kept."""
    require("cuda")
    torch.manual_seed(0)
    x = torch.rand(2, 70, 4) + 1
    x[..., 1] = float("-inf")
    weights = [torch.rand(4, 4) + 1 for _ in range(4)]
    weights[1][2] = 0
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[1] = False
    arguments = [t for w in weights for t in (w, None)]
    _, context = kernels.efficient_self_attention(x, *arguments, mask=mask, backend="cuda")
    _, expected = kernels.efficient_self_attention(x, *arguments, mask=mask, backend="reference")
    torch.testing.assert_close(context, expected, equal_nan=True)
    assert context[0].isnan().all()
    assert not context[1].any()


def test_heads_are_contiguous_slices() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 5, 4)
    weights = [torch.randn(4, 4) for _ in range(4)]
    arguments = [t for w in weights for t in (w, None)]
    two, context = kernels.efficient_self_attention(x, *arguments, num_heads=2, backend="reference")
    one = sum(
        kernels.efficient_self_attention(
            x,
            *(t for w in (*(w[h : h + 2] for w in weights[:3]), weights[3][:, h : h + 2]) for t in (w, None)),
            backend="reference",
        )[0]
        for h in (0, 2)
    )
    torch.testing.assert_close(two, one)
    assert context.shape == (1, 2, 2, 2)


def test_context_alone_is_differentiable(float64_backend: str) -> None:
    """As in the model's consistency loss: the output gets no gradient."""
    block = kernels.EfficientAttention(6, num_heads=2).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    found = {}
    for name in (float64_backend, "reference"):
        with kernels.use_backend(name):
            _, context = block(x)
            found[name] = torch.autograd.grad(context.square().sum(), (x, block.keys.weight), allow_unused=True)
    for a, b in zip(found[float64_backend], found["reference"], strict=True):
        torch.testing.assert_close(a, b)


def test_queries_that_are_too_many_to_be_kept_are_made_again() -> None:
    """Heads of one key feature are padded to whole vectors: these are 4.3 million values."""
    require("native")
    case = self_attention_case(
        "wide", batch=1, tokens=4200, channels=4, key_channels=64, value_channels=64, heads=64, memory=2
    )
    tensors = cast(case.draw(), torch.float32)
    expected, found = run(case, cast(tensors, torch.float64), "reference"), run(case, tensors, "native")
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-4 * value.norm() + 1e-6, name


def test_without_tokens_the_context_is_that_of_the_memory(float64_backend: str) -> None:
    case = self_attention_case("only_memory", tokens=0, heads=2, memory=3)
    tensors = cast(case.draw(), torch.float64)
    expected, found = run(case, tensors, "reference"), run(case, tensors, float64_backend)
    assert expected["output1"].any()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_rms_norm_and_memory_are_those_of_pytorch() -> None:
    """Of the reference, which the kernels are compared with."""
    torch.manual_seed(0)
    x, scale = torch.randn(2, 7, 4), torch.randn(4)
    weights = [torch.randn(4, 4) for _ in range(4)]
    arguments = [t for w in weights for t in (w, None)]
    normed = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * scale
    options: dict[str, Any] = {"norm_weight": scale, "norm_eps": 0.1, "norm_kind": "rms"}
    found, _ = kernels.efficient_self_attention(x, *arguments, **options, backend="reference")
    expected, _ = kernels.efficient_self_attention(normed, *arguments, backend="reference")
    torch.testing.assert_close(found, expected)

    memory = {name: torch.randn(1, 2, 4) for name in ("memory_key", "memory_value")}
    found, _ = kernels.efficient_self_attention(x, *arguments, **memory, backend="reference")
    query, key, value = (torch.nn.functional.linear(x, w)[:, None] for w in weights[:3])
    attended, _ = kernels.efficient_attention(query, key, value, **memory, backend="reference")
    torch.testing.assert_close(found, torch.nn.functional.linear(attended[:, 0], weights[3]))


def test_output_and_gradient_of_x_lie_in_memory_as_x_does(backend: str) -> None:
    """Images with channels first need no copies around the operator; a graph expects the same layout."""
    for name in ("transposed", "norm_residual", "images"):
        tensors = cast(CASES[name].draw(), torch.float32)
        x = tensors["x"]
        assert x is not None
        output = CASES[name].call(tensors, backend)[0]
        for found in (output, *torch.autograd.grad(output.sum(), x)):
            assert (found.transpose(-1, -2) if name == "transposed" else found).is_contiguous()


def test_gpu_backends_say_what_they_have_no_kernels_for() -> None:
    memory = {name: torch.zeros(1, 2, 4) for name in ("memory_key", "memory_value")}
    operator = OPERATORS["efficient_self_attention"]
    reasons = []
    for options in (memory, {"norm_weight": torch.ones(4), "norm_kind": "rms"}, {}):
        arguments = [t for _ in range(4) for t in (torch.zeros(4, 4), None)]
        found = dict(zip(operator.names, [torch.zeros(1, 3, 4), *arguments], strict=False)) | options
        defaults = dict(zip(operator.names, operator._defaults, strict=True))
        reasons.append(operator.why_not("triton", [{**defaults, **found}[name] for name in operator.names]))
    assert reasons == ["its kernels take no memory tokens", "its kernels have no norm of kind 'rms'", None]


def self_attention(**changes: Any) -> None:
    weights = {f"{name}_weight": torch.randn(4, 4) for name in ("query", "key", "value", "output")}
    biases = {f"{name}_bias": torch.randn(4) for name in ("query", "key", "value", "output")}
    kernels.efficient_self_attention(**({"x": torch.randn(2, 6, 4)} | weights | biases | changes))


BAD_ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.randn(6, 4)}, ValueError, r"x: expected \[B, N, C\], got shape \(6, 4\)"),
    ({"query_weight": torch.randn(4, 5)}, ValueError, r"query_weight: expected \[Dk, C\] = \(4, 4\)"),
    ({"key_weight": torch.randn(6, 4)}, ValueError, r"key_weight: expected \[Dk, C\] = \(4, 4\), got"),
    ({"key_bias": torch.randn(5)}, ValueError, r"key_bias: expected \[Dk\] = \(4,\), got \(5,\)"),
    ({"output_weight": torch.randn(4, 3)}, ValueError, r"output_weight: expected \[C, Dv\] = \(4, 4\)"),
    ({"num_heads": 3}, ValueError, "num_heads: 3 does not divide Dk = 4"),
    ({"num_heads": 0}, ValueError, "num_heads: expected at least 1, got 0"),
    ({"norm_kind": "batch"}, ValueError, "norm_kind: expected one of layer, rms, got 'batch'"),
    ({"memory_key": torch.randn(1, 2, 4)}, ValueError, "memory_value: expected a tensor beside memory_key, got None"),
    (
        {"memory_key": torch.randn(1, 2, 4), "memory_value": torch.randn(1, 2, 4)},
        ValueError,
        "key_bias: expected None beside memory_key",
    ),
    ({"norm_bias": torch.randn(4)}, ValueError, "norm_bias: given without norm_weight"),
    ({"value_weight": torch.randn(4, 4).half()}, TypeError, "value_weight: has dtype torch.float16"),
    ({"x": torch.zeros(2, 6, 4, dtype=torch.int32)}, TypeError, "x: expected a floating-point"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_ARGUMENTS)
def test_bad_argument(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    """The error names the argument, what came and what was expected."""
    self_attention()
    with pytest.raises(error, match=message):
        self_attention(**changes)
