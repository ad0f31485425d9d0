"""gradcheck of the compiled backward in float64, against differences of the compiled forward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import msformer_kernels as kernels
from tests.kernels.cases import SMALL, Case, attention_case, cast, mix_ffn_case, self_attention_case

# a ReLU has no derivative at its kink, which differences may straddle
SMOOTH = [case for case in SMALL if "relu" not in case.name and "expanded" not in case.name]


@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_gradcheck(case: Case, float64_backend: str) -> None:
    tensors = cast(case.make(), torch.float64)
    names = [name for name, x in tensors.items() if x is not None and x.requires_grad]

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        return case.call(tensors | dict(zip(names, leaves, strict=True)), float64_backend)

    assert torch.autograd.gradcheck(call, [tensors[name] for name in names], fast_mode=True, atol=1e-6)


@pytest.mark.parametrize("case", [attention_case(""), self_attention_case(""), mix_ffn_case("")], ids=str)
def test_second_derivative_says_that_it_is_not_supported(case: Case, float64_backend: str) -> None:
    tensors = cast(case.make(), torch.float64)
    x = next(iter(tensors.values()))
    assert x is not None
    (gradient,) = torch.autograd.grad(case.call(tensors, float64_backend)[0].square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r'second derivatives are not supported.*backend="reference"'):
        gradient.sum().backward()


@pytest.mark.parametrize(
    "case", [attention_case("", mask="one_image_masked", batch=2), self_attention_case(""), mix_ffn_case("")], ids=str
)
def test_the_reference_has_second_derivatives(case: Case) -> None:
    tensors = cast(case.make(), torch.float64)
    names = [name for name, x in tensors.items() if x is not None and x.requires_grad]

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        return case.call(tensors | dict(zip(names, leaves, strict=True)), "reference")

    assert torch.autograd.gradgradcheck(call, [tensors[name] for name in names], fast_mode=True, atol=1e-5)


def test_forward_mode_and_function_transforms_are_refused(float64_backend: str) -> None:
    """Rather than silently giving zero tangents."""
    q = torch.randn(1, 1, 4, 3)

    def call(q: Tensor, name: str) -> Tensor:
        return kernels.efficient_attention(q, q, q, backend=name)[0].sum()

    for transform in (torch.func.grad(call), lambda q, name: torch.func.jvp(lambda x: call(x, name), (q,), (q,))):
        with pytest.raises(NotImplementedError, match=r"torch\.func are not supported by the compiled kernels"):
            transform(q, float64_backend)
        transform(q, "reference")
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="forward-mode differentiation"):
            call(dual, float64_backend)


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
