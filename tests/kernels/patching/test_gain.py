"""The rule of gain: what is timed, and what is left alone. Times are made up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import msformer_kernels as kernels
from msformer_kernels.patching import gain, timing
from tests.kernels.patching.models import attentions, blocks, mix_ffns


class Model(nn.Module):
    """The second layer is called at two sizes, the last not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = mix_ffns.ImageMixFFN(hidden=12), mix_ffns.ImageMixFFN()
        self.attention, self.unused = attentions.LinearAttention(), mix_ffns.ImageMixFFN(hidden=20)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        self.second(x[..., ::2])
        return self.attention(self.second(self.first(self.drop(x))))


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What was timed. The first layer gains 3 and 2, the second 3 and 2 on wide images and 3 and 0.9 on narrow ones."""
    seen: list[tuple[str, int]] = []

    def medians(run: Callable[[nn.Module], Any], rivals: Sequence[nn.Module], samples: int) -> list[float]:
        original, patched = rivals
        assert type(patched).__mro__[1] is type(original)
        assert not patched.training
        shapes: list[int] = []
        handle = original.register_forward_pre_hook(lambda m, given: shapes.append(given[0].shape[3]))
        run(original)
        handle.remove()
        backward = any(p.grad is not None for p in original.parameters())
        seen.append((type(original).__name__, shapes[0]))
        return [3.0, 1.0] if not backward else [0.9 if shapes[0] == 4 else 2.0, 1.0]

    monkeypatch.setattr(gain, "medians", medians)
    return seen


def test_with_an_example_modules_are_timed_at_its_shapes(times: list[tuple[str, int]]) -> None:
    model = Model().train()
    report = kernels.patch(model, example=(torch.randn(1, 8, 6, 8),))
    assert [(r.name, r.note) for r in report.replaced] == [
        ("first", "3.00 x forward, 2.00 x with backward"),
        ("attention", "3.00 x forward, 2.00 x with backward"),
        ("unused", "not called by the example"),
    ]
    reason = "it gains too little here: 3.00 x forward, 0.90 x with backward, min_gain is 1.05"
    assert [(r.name, r.reason) for r in report.refused] == [("second", reason)]
    assert sorted({*times}) == [("ImageMixFFN", 4), ("ImageMixFFN", 8), ("LinearAttention", 8)]
    assert type(model.second) is mix_ffns.ImageMixFFN
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_min_gain_decides(times: list[tuple[str, int]]) -> None:
    example = (torch.randn(1, 8, 6, 8),)
    for least, expected in ((0.8, 4), (1.05, 3), (2.5, 1)):
        report = kernels.patch(Model(), example=example, min_gain=least)
        assert len(report.replaced) == expected
        assert {r.name for r in report.replaced} >= {"unused"}


def test_layers_that_are_alike_are_timed_once(times: list[tuple[str, int]]) -> None:
    model = nn.Sequential(*(mix_ffns.ImageMixFFN() for _ in range(3)))
    assert len(kernels.patch(model, example=(torch.randn(1, 8, 6, 8),)).replaced) == 3
    assert len(times) == 2


def test_without_an_example_nothing_is_timed(times: list[tuple[str, int]]) -> None:
    report = kernels.patch(Model())
    assert times == []
    assert [r.name for r in report.replaced] == ["first", "second", "unused"]
    assert [r.name for r in report.refused] == ["attention"]
    assert "give `example`" in report.refused[0].reason


def test_a_block_without_gain_is_reported_beside_its_feed_forward_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def medians(run: Callable[[nn.Module], Any], rivals: Sequence[nn.Module], samples: int) -> list[float]:
        return [0.5 if isinstance(rivals[0], blocks.TupleBlock) else 2.0, 1.0]

    monkeypatch.setattr(gain, "medians", medians)
    report = kernels.patch(blocks.TupleBlock(), example=(torch.randn(1, 24, 8), 6, 4))
    assert [r.name for r in report.replaced] == ["mlp"]
    assert [r.name for r in report.refused] == [""]


def test_min_gain_of_zero_takes_whatever_is_proved(times: list[tuple[str, int]]) -> None:
    assert len(kernels.patch(Model(), example=(torch.randn(1, 8, 6, 8),), min_gain=0).replaced) == 4
    assert times == []


def test_the_times_are_those_of_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that runs when a rival does; short calls are repeated."""
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    calls: list[nn.Module] = []
    slow, fast = nn.Linear(1, 1), nn.Linear(1, 1)

    def run(rival: nn.Module) -> None:
        calls.append(rival)
        clock[0] += 1e-3 if rival is slow else 1e-4

    assert timing.medians(run, [slow, fast], 3) == pytest.approx([1e-3, 1e-4])
    assert (calls.count(slow), calls.count(fast)) == (2 + 3 * 2, 2 + 3 * 20)


def test_a_real_measurement_is_finite() -> None:
    report = kernels.patch(mix_ffns.DenseMixFFN(), example=(torch.randn(1, 24, 8), 6, 4), min_gain=1e-6)
    assert "x forward" in report.replaced[0].note
