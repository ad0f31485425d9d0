"""A few seconds in which every operator shows that it computes the right thing, and how fast.

Results and gradients of the backend that a call gets are compared with the reference in float64 on the same inputs,
beside those of eager PyTorch, which is the reference in the type of the inputs. This finds an installation that is
broken; what the kernels promise, and how that is tested, is in docs/accuracy.md.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import msformer_kernels

MOST = 8.0
"""Times the root-mean-square error of eager PyTorch that an error may be, and as many roundings of a typical value."""
SECONDS = 0.25
"""For the times of one operator."""
SMALL, LARGE = (24, 20, 32), (48, 48, 64)
"""Height, width and channels: for errors, and for times."""
HEADS = 2


@dataclass(frozen=True)
class Verdict:
    """What an operator did on a device."""

    operator: str
    device: str
    dtype: str
    backend: str | None
    error: float | None
    """The largest root-mean-square error, of outputs and gradients, relative to the values of their tensor."""
    eager_error: float | None
    milliseconds: float | None
    """Of a call with its gradients; None where only the error is asked for."""
    eager_milliseconds: float | None
    problem: str = ""
    """What is wrong; empty if nothing is."""


@dataclass(frozen=True)
class Probe:
    """A call of an operator."""

    operator: str
    tensors: Mapping[str, Tensor]
    options: Mapping[str, Any]

    def run(self, backend: str | None) -> list[Tensor]:
        """Outputs and gradients of all tensors."""
        inputs = {name: tensor.detach().requires_grad_() for name, tensor in self.tensors.items()}
        found = getattr(msformer_kernels, self.operator)(**inputs, **self.options, backend=backend)
        outputs = [found] if isinstance(found, Tensor) else [each for each in found if each.requires_grad]
        gradients = torch.autograd.grad(outputs, list(inputs.values()), [_direction(each) for each in outputs])
        return [*(each.detach() for each in outputs), *gradients]

    def to(self, device: str, dtype: torch.dtype) -> Probe:
        """The same with tensors of another kind."""
        moved = {name: tensor.to(device, dtype) for name, tensor in self.tensors.items()}
        return Probe(self.operator, moved, self.options)


def _direction(output: Tensor) -> Tensor:
    """A gradient of an output that is the same in every type."""
    random = torch.Generator().manual_seed(1)
    return torch.randn(output.shape, generator=random).bfloat16().to(output)


def probes(height: int, width: int, dim: int) -> list[Probe]:
    """A call of each operator with random tensors, float64 on the CPU."""
    random = torch.Generator().manual_seed(0)
    tokens, hidden, depth = height * width, 4 * dim, dim // HEADS

    def tensor(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64) * scale

    def weights(**sizes: tuple[int, ...]) -> dict[str, Tensor]:
        return {name: tensor(*size, scale=dim**-0.5) for name, size in sizes.items()}

    square, line = (dim, dim), (dim,)
    heads = {name: tensor(1, HEADS, tokens, depth) for name in ("query", "key", "value")}
    projections = weights(
        query_weight=square, query_bias=line, key_weight=square, value_weight=square, value_bias=line,
        output_weight=square, output_bias=line,
    )  # fmt: skip
    mixed = weights(
        fc1_weight=(hidden, dim), fc1_bias=(hidden,), dw_weight=(hidden, 1, 3, 3), dw_bias=(hidden,),
        fc2_weight=(dim, hidden), fc2_bias=line,
    )  # fmt: skip
    x = {"x": tensor(1, tokens, dim)}
    return [
        Probe("efficient_attention", heads, {}),
        Probe("efficient_self_attention", x | projections, {"key_bias": None, "num_heads": HEADS}),
        Probe("mix_ffn", x | mixed, {"height": height, "width": width}),
        Probe("linear", x | weights(weight=(hidden, dim), bias=(hidden,)), {}),
        Probe("batch_norm", x | weights(weight=line, bias=line), {}),
    ]


def self_test(devices: list[str]) -> Iterator[Verdict]:
    """Verdicts on all operators on each device, float32 with times and bfloat16 without."""
    for device in devices:
        for small, large in zip(probes(*SMALL), probes(*LARGE), strict=True):
            for dtype in (torch.float32, torch.bfloat16):
                yield _verdict(small, large if dtype == torch.float32 else None, device, dtype)


def _verdict(small: Probe, large: Probe | None, device: str, dtype: torch.dtype) -> Verdict:
    kind = str(dtype).removeprefix("torch.")
    backend: str | None = None
    try:
        backend = msformer_kernels.explain(device, dtype, small.operator).chosen
        error, eager_error, problem = _errors(small.to(device, dtype), dtype)
        ours, eager = (None, None) if large is None else _times(large.to(device, dtype), device)
    except Exception as failure:  # whatever a broken installation raises
        problem = f"{type(failure).__name__}: {failure}"
        return Verdict(small.operator, device, kind, backend, None, None, None, None, problem)
    return Verdict(small.operator, device, kind, backend, error, eager_error, ours, eager, problem)


def _errors(probe: Probe, dtype: torch.dtype) -> tuple[float, float, str]:
    """The largest error, that of eager PyTorch in the same tensor, and what is wrong with any of them."""
    exact = probe.to("cpu", torch.float64).run("reference")
    found, eager = probe.run(None), probe.run("reference")
    rounding = torch.finfo(dtype).eps / 2
    largest, problem = (0.0, 0.0), ""
    for number, (right, ours, theirs) in enumerate(zip(exact, found, eager, strict=True)):
        size = _rms(right) or 1.0
        error, eager_error = (_rms(each.to("cpu", torch.float64) - right) / size for each in (ours, theirs))
        if not error <= MOST * max(eager_error, rounding):  # also where it is NaN
            problem = problem or f"result {number} has the error {error:.1e}, eager PyTorch {eager_error:.1e}"
        largest = max(largest, (error, eager_error))
    return *largest, problem


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _times(probe: Probe, device: str) -> tuple[float, float]:
    """Milliseconds of a call and of eager PyTorch, which take turns."""

    def seconds(backend: str | None) -> float:
        start = time.perf_counter()
        probe.run(backend)
        if device != "cpu":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    rivals: tuple[str | None, ...] = (None, "reference")
    for rival in rivals:  # the first call makes what the others find
        seconds(rival)
    taken: list[list[float]] = [[], []]
    end = time.perf_counter() + SECONDS
    while not taken[0] or time.perf_counter() < end:
        for samples, rival in zip(taken, rivals, strict=True):
            samples.append(seconds(rival))
    ours, eager = (1000 * statistics.median(samples) for samples in taken)
    return ours, eager
