"""MixFFN and MixFFN-skip."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import msformer_kernels as kernels
from msformer_kernels.ops.mix_ffn.reference import ACTIVATIONS
from tests.kernels.cases import Case, cast, mix_ffn_case, require, run
from tests.kernels.cases.mix_ffn import CASES
from tests.kernels.ops.shared import DTYPES, OperatorTests, check_error_rule


class TestMixFFN(OperatorTests):
    OPERATOR = "mix_ffn"
    CASES = CASES


@pytest.mark.accuracy
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(
    ("case", "environment"),
    [
        # more output channels than a block makes, with all channels on the chip and with some at a time
        (mix_ffn_case("two_blocks", channels=144, hidden=70, width=9), {}),
        (mix_ffn_case("three_blocks", channels=300, hidden=40), {"MSFORMER_EMULATE_SHARED_KB": "163"}),
        (mix_ffn_case("chunks", channels=144, hidden=40, hidden_norm=False), {"MSFORMER_EMULATE_SHARED_KB": "128"}),
        (CASES["tiles"], {"MSFORMER_EMULATE_PROCESSORS": "16"}),
        # the pass over tokens has no room for them
        (mix_ffn_case("far_too_wide", channels=1900, hidden=9, height=1), {"MSFORMER_EMULATE_SHARED_KB": "128"}),
    ],
    ids=lambda value: str(value) if isinstance(value, Case) else "",
)
def test_every_form_of_the_cuda_kernels(
    case: Case, environment: dict[str, str], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("cuda")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check_error_rule(case, dtype, "cuda", most=1 if case.name == "far_too_wide" else 2)  # which is slow


@pytest.mark.accuracy
def test_float32_fits_a_gpu_with_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The narrower dtypes, whose tiles are larger, do not: by the capability rule."""
    require("cuda")
    monkeypatch.setenv("MSFORMER_EMULATE_SHARED_KB", "99")
    case = mix_ffn_case("wide", channels=260, hidden=40)
    check_error_rule(case, "f32", "cuda", most=2)
    with pytest.raises(kernels.BackendError, match=r"bfloat16 need 128 KiB of shared memory .* this GPU has 99"):
        run(case, cast(case.draw(), torch.bfloat16), "cuda")


def test_without_hidden_channels_there_are_the_residual_and_the_bias(backend: str) -> None:
    case = mix_ffn_case("no_hidden", hidden=0, hidden_norm=False)
    inputs = cast(case.draw(), torch.float32)
    if backend == "triton":
        with pytest.raises(kernels.BackendError, match="at least one hidden channel"):
            run(case, inputs, backend)
        return
    expected = run(case, inputs, "reference")
    for name, value in run(case, inputs, backend).items():
        torch.testing.assert_close(value, expected[name])


def test_mix_ffn_by_hand() -> None:
    """One channel, 2 x 2 image, identity linears: a 3x3 convolution with zero padding, the skip, and GELU."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64).view(1, 4, 1)
    one = torch.ones(1, 1, dtype=torch.float64)
    taps = torch.arange(1.0, 10.0, dtype=torch.float64).view(1, 1, 3, 3)
    found = kernels.mix_ffn(x, 2, 2, one, None, taps, None, one, None, skip=True, residual=True, backend="reference")
    # top left: centre tap 5, right 6, below 8, below right 9
    z = 1 * 5 + 2 * 6 + 3 * 8 + 4 * 9 + 1
    assert found[0, 0, 0].item() == pytest.approx(1 + z * 0.5 * (1 + math.erf(z / math.sqrt(2))))


def test_the_second_half_gates_the_first(float64_backend: str) -> None:
    """A value of -3 and a gate of 2; the other way round it would be 0."""
    fc1, tap, one = (torch.tensor(v, dtype=torch.float64) for v in ([[-3], [2]], [1, 1], [[1]]))
    taps = F.pad(tap.view(2, 1, 1, 1), (1, 1, 1, 1))
    options = {"activation": "relu", "gated": True, "backend": float64_backend}
    found = kernels.mix_ffn(one[None], 1, 1, fc1, None, taps, None, one, None, **options)
    assert found.item() == -6


@pytest.mark.accuracy
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activation_over_its_whole_range(activation: str, backend: str) -> None:
    """Through an operator that only applies the activation: identity linears, a centre tap of one."""
    points = [torch.linspace(-14, 14, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 60.0, -60.0, 3.0, -3.0, 6.0])]
    x = torch.cat(points).view(1, -1, 1)
    one, tap = torch.ones(1, 1), torch.zeros(1, 1, 3, 3)
    tap[..., 1, 1] = 1

    def value_and_slope(dtype: torch.dtype, name: str) -> dict[str, Tensor]:
        leaf = x.to(dtype).requires_grad_()
        arguments = (t for w in (one, tap, one) for t in (w.to(dtype), None))
        output = kernels.mix_ffn(leaf, 1, x.shape[1], *arguments, activation=activation, backend=name)
        return {"value": output.detach(), "slope": torch.autograd.grad(output.sum(), leaf)[0]}

    ours, eager = value_and_slope(torch.float32, backend), value_and_slope(torch.float32, "reference")
    for name, exact in value_and_slope(torch.float64, "reference").items():
        error, allowed = ((found[name].double() - exact).abs().max().item() for found in (ours, eager))
        ulp = torch.finfo(torch.float32).eps * exact.abs().max().item()
        assert error <= 2 * allowed + 2 * ulp, f"{name}: error {error:.3g}, eager {allowed:.3g}, ulp {ulp:.3g}"


@pytest.mark.parametrize("options", [{"kernel_size": 5}, {"kernel_size": 7}, {"gated": True, "hidden_norm": False}])
def test_gradients_of_larger_convolutions_and_of_gates(options: dict[str, Any], float64_backend: str) -> None:
    """Of an image that is narrower than the convolutions."""
    case = mix_ffn_case("larger", height=6, width=3, channels=2, **({"hidden": 4} | options))
    tensors = cast(case.draw(), torch.float64)
    names = [n for n, x in tensors.items() if x is not None]

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        return case.call(tensors | dict(zip(names, leaves, strict=True)), float64_backend)

    assert torch.autograd.gradcheck(call, [tensors[n] for n in names])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slopes_of_large_arguments_are_finite(dtype: torch.dtype) -> None:
    """Where the exponential of an activation would be infinite in float64."""
    require("native")
    x = torch.tensor([-1e4, -800, -100, -30, -20, 20, 30, 100, 800, 1e4], dtype=dtype).view(1, -1, 1)
    one, tap = torch.ones(1, 1, dtype=dtype), torch.zeros(1, 1, 3, 3, dtype=dtype)
    tap[..., 1, 1] = 1
    for activation, linear in product(ACTIVATIONS, ("inner_activation", "activation")):
        found = []
        for name in ("reference", "native"):
            leaf = x.clone().requires_grad_()
            options = {"activation": "identity", linear: activation}
            output = kernels.mix_ffn(leaf, 1, x.shape[1], one, None, tap, None, one, None, backend=name, **options)
            found.append(torch.cat([output, *torch.autograd.grad(output.sum(), leaf)]).detach())
        torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-6, msg=activation)


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "identity"])
def test_far_below_zero(activation: str, backend: str) -> None:
    """Slopes are exactly zero, whatever they are multiplied with; and minus infinity is what it is in PyTorch."""
    weight, tap = torch.ones(1, 1, requires_grad=True), torch.zeros(1, 1, 3, 3)
    tap[..., 1, 1] = 1

    def output_of(x: float, name: str) -> Tensor:
        tokens = torch.full((1, 1, 1), x)
        return kernels.mix_ffn(tokens, 1, 1, weight, None, tap, None, weight, None, activation=activation, backend=name)

    for x in (-1e5, -1e10, -1e15):
        output = output_of(x, backend)
        assert output.item() == 0
        assert torch.autograd.grad(output.sum(), weight)[0].item() == 0
    expected, found = (output_of(-math.inf, name).item() for name in ("reference", backend))
    assert math.isnan(found) == math.isnan(expected)


def test_what_an_activation_cuts_off_is_gone(backend: str) -> None:
    """Minus infinity before a ReLU, with fewer features than a vector has."""
    torch.manual_seed(0)
    x, one, tap = torch.randn(1, 12, 1), torch.ones(1, 1), torch.randn(1, 1, 3, 3)
    x[0, 5] = -math.inf
    options = {"hidden_norm_weight": one[0], "hidden_norm_bias": one[0], "inner_activation": "relu"}
    if backend == "cuda":
        pytest.skip("its kernels have no activation before the convolution")
    output = kernels.mix_ffn(x, 3, 4, one, None, tap, None, one, None, **options, backend=backend)
    assert output.isfinite().all()


def test_a_hidden_norm_of_huge_values_is_no_number_or_that_of_pytorch(backend: str) -> None:
    """The variance of the hidden features is beyond the largest float."""
    torch.manual_seed(0)
    x, weight, tap, one = torch.randn(1, 1, 8) * 1e37, torch.randn(8, 8), torch.randn(8, 1, 3, 3), torch.ones(8)
    options = {"hidden_norm_weight": one, "hidden_norm_bias": one, "activation": "identity"}
    expected, found = (
        kernels.mix_ffn(x, 1, 1, weight, None, tap, None, weight, None, **options, backend=name)
        for name in ("reference", backend)
    )
    assert (found.isnan() | (found - expected).abs().lt(1e-3)).all()


@pytest.mark.parametrize("skip", [True, False])
def test_gradients_through_an_activation_before_the_convolution(skip: bool, float64_backend: str) -> None:
    case = mix_ffn_case("inner", skip=skip, hidden_norm=skip, inner_activation="gelu_tanh", activation="silu")
    tensors = cast(case.draw(), torch.float64)
    names = [n for n, x in tensors.items() if x is not None]

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        return case.call(tensors | dict(zip(names, leaves, strict=True)), float64_backend)

    assert torch.autograd.gradcheck(call, [tensors[n] for n in names])


@pytest.mark.accuracy
@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "identity"])
def test_an_activation_before_the_convolution_in_triton(name: str) -> None:
    require("triton")
    case = mix_ffn_case("inner", channels=5, hidden=7, inner_activation=name)
    check_error_rule(case, "f32", "triton", most=1)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("cuda", {"inner_activation": "relu"}, "inner_activation is 'relu', its kernels have none"),
        *(
            (name, options, reason)
            for name in ("cuda", "triton")
            for options, reason in (
                ({"gated": True, "hidden_norm": False}, "gated is True, its kernels have no gate"),
                ({"kernel_size": 7}, "dw_weight is 7x7, its kernels take 3x3 alone"),
            )
        ),
    ],
)
def test_what_the_kernels_of_a_gpu_do_not_take(name: str, options: dict[str, Any], reason: str) -> None:
    require(name)
    case = mix_ffn_case("other", **options)
    with pytest.raises(kernels.BackendError, match=reason):
        run(case, cast(case.draw(), torch.float32), name)


@pytest.mark.parametrize("whole", [True, False])
def test_an_image_of_any_width_fits_a_launch_grid(whole: bool) -> None:
    """CUDA has at most 65535 programs along the axes of a grid after the first."""
    pytest.importorskip("triton")
    from msformer_kernels.ops.mix_ffn.triton_calls import _walk

    walk = _walk("activation", torch.empty(1, 0, 2048), 1, 1 << 20, whole)
    assert max(walk.grid[1:]) <= 65535
    bands, _, column_tiles = walk.cuts
    assert walk.grid[0] == bands * column_tiles
    assert column_tiles * walk.blocks["BW"] >= 1 << 20


def mix_ffn(**changes: Any) -> None:
    arguments: dict[str, Any] = {
        "x": torch.randn(2, 6, 4),
        "height": 2,
        "width": 3,
        "fc1_weight": torch.randn(8, 4),
        "fc1_bias": None,
        "dw_weight": torch.randn(8, 1, 3, 3),
        "dw_bias": None,
        "fc2_weight": torch.randn(4, 8),
        "fc2_bias": None,
    }
    kernels.mix_ffn(**(arguments | changes))


BAD_ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.randn(2, 4, 2, 3)}, ValueError, r"x: expected \[B, N, C\], got shape"),
    ({"height": 3}, ValueError, r"x: has 6 tokens, expected height \* width = 3 \* 3 = 9"),
    ({"height": -2, "width": -3}, ValueError, "x: has 6 tokens"),
    (
        {"fc1_weight": torch.randn(8, 5)},
        ValueError,
        r"fc1_weight: expected \[hidden, C\] = \(8, 4\), got \(8, 5\)",
    ),
    (
        {"dw_weight": torch.randn(8, 3, 3)},
        ValueError,
        r"dw_weight: expected .* = \(8, 1, k, k\) with k = 3 or 5 or 7, got \(8, 3, 3\)",
    ),
    ({"dw_weight": torch.randn(8, 1, 9, 9)}, ValueError, r"dw_weight: .* got \(8, 1, 9, 9\)"),
    ({"dw_weight": torch.randn(8, 1, 3, 5)}, ValueError, r"dw_weight: .* got \(8, 1, 3, 5\)"),
    ({"dw_weight": torch.randn(4, 1, 5, 5)}, ValueError, r"dw_weight: .* = \(8, 1, k, k\) .* got \(4, 1, 5, 5\)"),
    ({"fc2_weight": torch.randn(8, 4)}, ValueError, r"fc2_weight: expected \[C, hidden\] = \(4, 8\), got"),
    ({"gated": True}, ValueError, r"fc2_weight: expected \[C, hidden / 2\] = \(4, 4\), got \(4, 8\)"),
    ({"gated": True, "fc1_weight": torch.randn(7, 4), "dw_weight": torch.randn(7, 1, 3, 3)}, ValueError, "has 7 rows"),
    ({"gated": True, "hidden_norm_weight": torch.randn(8)}, ValueError, "hidden_norm_weight: expected None"),
    ({"hidden_norm_bias": torch.randn(8)}, ValueError, "hidden_norm_bias: given without hidden_norm_weight"),
    (
        {"hidden_norm_weight": torch.randn(4)},
        ValueError,
        r"hidden_norm_weight: expected .* = \(8,\), got \(4,\)",
    ),
    ({"activation": "swish"}, ValueError, "activation: expected one of gelu, .*relu6, identity, got 'swish'"),
    ({"inner_activation": "none"}, ValueError, "inner_activation: expected one of gelu, .* got 'none'"),
    ({"fc2_bias": torch.randn(4).double()}, TypeError, "fc2_bias: has dtype torch.float64"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_ARGUMENTS)
def test_bad_argument(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    """The error names the argument, what came and what was expected."""
    mix_ffn()
    with pytest.raises(error, match=message):
        mix_ffn(**changes)
