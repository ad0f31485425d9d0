"""What PyTorch's own tools count and name: FlopCounterMode, the profiler."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import msformer_kernels as kernels
from msformer_kernels.core.operator import OPERATORS
from tests.kernels.cases import (
    Case,
    attention_case,
    batch_norm_case,
    cast,
    linear_case,
    mix_ffn_case,
    require,
    run,
    self_attention_case,
)

CASES = [
    attention_case("efficient_attention", batch=2, heads=2, query_tokens=5, tokens=7, key_channels=4, value_channels=6),
    self_attention_case("efficient_self_attention", heads=2, key_channels=4, value_channels=10),
    mix_ffn_case("mix_ffn"),
    linear_case("linear"),
    batch_norm_case("batch_norm"),
]


def forward_and_backward(case: Case, backend: str) -> tuple[int, int]:
    """Operations of the forward alone, and of it and its backward."""
    tensors = cast(case.draw(), torch.float32)
    with FlopCounterMode(display=False) as forward:
        case.call(tensors, backend)
    with FlopCounterMode(display=False) as both:
        run(case, tensors, backend)
    return forward.get_total_flops(), both.get_total_flops()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_flops_are_those_of_the_reference(case: Case, backend: str) -> None:
    require(backend, case.name)
    forward, both = forward_and_backward(case, backend)
    expected, expected_both = forward_and_backward(case, "reference")
    assert forward == expected
    assert both == 3 * forward
    if case.name != "mix_ffn":  # PyTorch counts the weight gradient of a depthwise convolution as that of a dense one
        assert both == expected_both


def test_a_gradient_that_is_not_wanted_is_not_counted() -> None:
    require("native")
    x, weight = torch.randn(2, 12, 6), torch.randn(5, 6, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        kernels.linear(x, weight, backend="native").sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 2 * 12 * 6 * 5


def test_flops_of_a_block() -> None:
    block, x = kernels.EfficientTransformerBlock(8, num_heads=2), torch.randn(2, 12, 8)
    counted = []
    for name in kernels.available_backends():
        with kernels.use_backend(name), FlopCounterMode(display=False) as counter:
            block(x, 3, 4)
        counted.append(counter.get_total_flops())
    assert set(counted) == {2 * 2 * 12 * (4 * 8 * 8 + 2 * 8 * 4 + 2 * 8 * 32 + 32 * 9)}


def test_the_profiler_names_the_operators(backend: str) -> None:
    block, x = kernels.EfficientTransformerBlock(8), torch.randn(1, 12, 8)
    linear = kernels.TokenLinear(8, 3)
    norm = kernels.TokenBatchNorm(3)
    with kernels.use_backend(backend), profile(activities=[ProfilerActivity.CPU]) as profiler:
        output: Tensor = norm(linear(block(x, 3, 4)[0]))
        output.square().sum().backward()
    names = {event.key for event in profiler.key_averages()}
    for operator in ("efficient_self_attention", "mix_ffn", "linear", "batch_norm"):
        if backend in OPERATORS[operator].served_by:
            assert {f"msformer::{operator}", f"msformer::{operator}_backward"} <= names
