"""The transforms of PyTorch: every one gives what the reference gives, and vmap keeps the backend."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import msformer_kernels as kernels
from tests.kernels.cases import require

HEIGHT, WIDTH, DIM = 2, 2, 4


def block_and_images(dtype: torch.dtype = torch.float64) -> tuple[kernels.EfficientTransformerBlock, Tensor]:
    torch.manual_seed(0)
    block = kernels.EfficientTransformerBlock(DIM, num_heads=2).to(dtype)
    return block, torch.randn(3, HEIGHT * WIDTH, DIM, dtype=dtype)


class Calls(TorchDispatchMode):
    """The calls of ops: name, number of images, backend."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int, str]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "msformer":
            self.seen.append((func.name().removeprefix("msformer::"), args[0].shape[0], args[-1]))
        return func(*args, **(kwargs or {}))


def both(call: Callable[[], Any], name: str) -> tuple[Any, Any]:
    found = []
    for backend in (name, "reference"):
        with kernels.use_backend(backend):
            found.append(call())
    return found[0], found[1]


def transforms() -> dict[str, Callable[[kernels.EfficientTransformerBlock, Tensor], Any]]:
    """By name, what is done to a block and images; all of it in PyTorch's words."""

    def one(block: Any) -> Callable[[Tensor], Tensor]:
        return lambda image: block(image[None], HEIGHT, WIDTH)[0].squeeze(0)

    def loss(block: Any) -> Callable[[Tensor], Tensor]:
        def of(x: Tensor) -> Tensor:
            output, context = block(x, HEIGHT, WIDTH)
            return output.square().sum() + (context**3).sum()

        return of

    def loss_of(parameters: dict[str, Tensor], block: Any, x: Tensor) -> Tensor:
        return functional_call(block, parameters, (x, HEIGHT, WIDTH))[0].square().sum()

    def parameters(block: Any) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in block.named_parameters()}

    def models(block: Any) -> dict[str, Tensor]:
        return {name: torch.stack([p, 1.1 * p]) for name, p in parameters(block).items()}

    def square_of_one(block: Any) -> Callable[[Tensor], Tensor]:
        return lambda image: one(block)(image).square().sum()

    def norms(block: Any) -> dict[str, Tensor]:
        return {name: p for name, p in parameters(block).items() if "norm" in name}

    def recorded(change: Callable[[Tensor], Tensor], x: Tensor) -> Any:
        """A derivative by autograd of a result of `torch.func`."""
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(change(leaf).square().sum(), leaf)

    return {
        "vmap": lambda b, x: vmap(one(b))(x),
        "vmap_of_another_dim": lambda b, x: vmap(one(b), in_dims=1)(x.transpose(0, 1).contiguous()),
        "vmap_of_vmap": lambda b, x: vmap(vmap(one(b)))(torch.stack([x, 2 * x])),
        "grad": lambda b, x: grad(loss(b))(x),
        "grad_of_parameters": lambda b, x: grad(loss_of)(parameters(b), b, x),
        "gradients_by_image": lambda b, x: vmap(grad(square_of_one(b)))(x),
        "gradients_of_parameters_by_image": lambda b, x: vmap(
            grad(lambda p, image: loss_of(p, b, image[None])), in_dims=(None, 0)
        )(parameters(b), x),
        "models": lambda b, x: vmap(lambda p: loss_of(p, b, x))(models(b)),
        "gradients_of_models": lambda b, x: vmap(grad(lambda p: loss_of(p, b, x)))(models(b)),
        "grad_of_vmap": lambda b, x: grad(lambda x: vmap(one(b))(x).square().sum())(x),
        "vjp": lambda b, x: vjp(one(b), x[0])[1](x[1]),
        "jvp": lambda b, x: jvp(one(b), (x[0],), (x[1],)),
        "jvp_without_grad": lambda b, x: torch.no_grad()(lambda: jvp(one(b), (x[0],), (x[1],)))(),
        "jvp_of_vmap": lambda b, x: jvp(vmap(one(b)), (x,), (x.flip(0),)),
        "vmap_of_jvp": lambda b, x: vmap(lambda image: jvp(one(b), (image,), (image,))[1])(x),
        "linearize": lambda b, x: linearize(one(b), x[0])[1](x[1]),
        "jacrev": lambda b, x: jacrev(one(b))(x[0]),
        "jacrev_in_chunks": lambda b, x: jacrev(one(b), chunk_size=3)(x[0]),
        "jacfwd": lambda b, x: jacfwd(one(b))(x[0]),
        "hessian": lambda b, x: hessian(loss(b))(x[:1]),
        "hessian_of_parameters": lambda b, x: hessian(lambda p: loss_of(p, b, x))(norms(b)),
        "hessians_by_image": lambda b, x: vmap(hessian(square_of_one(b)))(x),
        "jacrev_of_jacrev": lambda b, x: jacrev(jacrev(loss(b)))(x[:1]),
        "jacrev_of_jacfwd": lambda b, x: jacrev(jacfwd(loss(b)))(x[:1]),
        "jacfwd_of_jacfwd": lambda b, x: jacfwd(jacfwd(loss(b)))(x[:1]),
        "third": lambda b, x: grad(lambda x: grad(lambda x: grad(loss(b))(x)[0, 0, 0])(x)[0, 0, 1])(x[:1]),
        "autograd_of_grad": lambda b, x: recorded(grad(loss(b)), x),
        "autograd_of_vmap_of_grad": lambda b, x: recorded(vmap(grad(square_of_one(b))), x),
        "functional_hessian": lambda b, x: torch.autograd.functional.hessian(loss(b), x[:1]),
        "functional_hessian_vectorized": lambda b, x: torch.autograd.functional.hessian(
            loss(b), x[:1], vectorize=True, outer_jacobian_strategy="forward-mode"
        ),
        "functional_jvp": lambda b, x: torch.autograd.functional.jvp(one(b), x[0], x[1]),
        "functional_jacobian": lambda b, x: torch.autograd.functional.jacobian(one(b), x[0], vectorize=True),
    }


TRANSFORMS = transforms()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_gives_what_the_reference_gives(name: str, float64_backend: str) -> None:
    block, x = block_and_images()
    found, expected = both(lambda: TRANSFORMS[name](block, x), float64_backend)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["vmap", "gradients_of_parameters_by_image", "models", "hessian", "autograd_of_grad"])
def test_transforms_of_other_backends(name: str, backend: str) -> None:
    block, x = block_and_images(torch.float32)
    found, expected = both(lambda: TRANSFORMS[name](block, x), backend)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("transform", ["grad", "hessian", "jacrev_twice", "by_image", "grad_of_vmap"])
@pytest.mark.parametrize("operator", ["linear", "batch_norm", "attention_with_mask"])
def test_transforms_of_the_other_operators(operator: str, transform: str, float64_backend: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 4, dtype=torch.float64)
    weight, bias, mask = torch.randn(4, 4, dtype=x.dtype), torch.randn(4, dtype=x.dtype), torch.rand(3, 4) > 0.3

    def cubed(x: Tensor, mask: Tensor) -> Tensor:
        if operator == "linear":
            return kernels.linear(x, weight, bias).pow(3).sum()
        if operator == "batch_norm":
            return kernels.batch_norm(x, weight[0], bias)[0].pow(3).sum()
        heads = x[:, None]
        output, context = kernels.efficient_attention(heads, 2 * heads, heads, mask=mask, query_scale=0.7)
        return output.pow(3).sum() + context.square().sum()

    def by_image(change: Any) -> Callable[[], Tensor]:
        return lambda: vmap(change(lambda x, mask: cubed(x[None], mask[None])))(x, mask)

    call = {
        "grad": lambda: grad(cubed)(x, mask),
        "hessian": lambda: hessian(cubed)(x, mask),
        "jacrev_twice": lambda: jacrev(jacrev(cubed))(x, mask),
        "by_image": by_image(grad),
        "grad_of_vmap": lambda: grad(lambda x: vmap(lambda x, m: cubed(x[None], m[None]))(x, mask).sum())(x),
    }[transform]
    found, expected = both(call, float64_backend)
    torch.testing.assert_close(found, expected)


def test_tangents_of_dual_tensors(float64_backend: str) -> None:
    block, x = block_and_images()

    def tangents() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        with forward_ad.dual_level():
            output, context = block(forward_ad.make_dual(leaf, x.flip(0)), HEIGHT, WIDTH)
            (gradient,) = torch.autograd.grad(output.square().sum(), leaf, retain_graph=True)
            return [forward_ad.unpack_dual(t).tangent for t in (output, context, gradient)]

    found, expected = both(tangents, float64_backend)
    assert all(t is not None for t in found)
    torch.testing.assert_close(found, expected)


def test_tangents_of_a_gradient_that_comes_in(float64_backend: str) -> None:
    """The forward was before there were tangents."""
    block, x = block_and_images()

    def tangent() -> Tensor:
        leaf = x.clone().requires_grad_()
        output, _ = block(leaf, HEIGHT, WIDTH)
        with forward_ad.dual_level():
            (gradient,) = torch.autograd.grad(output, leaf, forward_ad.make_dual(x, x.flip(0)))
            return forward_ad.unpack_dual(gradient).tangent

    found, expected = both(tangent, float64_backend)
    torch.testing.assert_close(found, expected)


def test_gradient_penalty(float64_backend: str) -> None:
    """Second and third derivatives, of parameters as well."""
    block, x = block_and_images()
    parameters = [p for name, p in block.named_parameters() if not name.endswith("keys.bias")]

    def penalised() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        output, context = block(leaf, HEIGHT, WIDTH)
        (first,) = torch.autograd.grad(output.square().sum() + context.sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf, create_graph=True)
        return list(torch.autograd.grad(first.pow(3).sum() + second.square().sum(), [leaf, *parameters]))

    found, expected = both(penalised, float64_backend)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_second_derivatives_in_half_precision(dtype: torch.dtype, backend: str) -> None:
    block, x = block_and_images(torch.float32)

    def second(dtype: torch.dtype) -> Tensor:
        leaf = x.to(dtype).requires_grad_()
        output, _ = block.to(dtype)(leaf, HEIGHT, WIDTH)
        (first,) = torch.autograd.grad(output.float().square().mean(), leaf, create_graph=True)
        return torch.autograd.grad(first.float().square().sum(), leaf)[0].double()

    found, expected = both(lambda: second(dtype), backend)
    assert (found - expected).norm() <= 0.1 * expected.norm()


def test_no_graph_where_gradients_are_off() -> None:
    block, x = block_and_images()
    leaf = x.clone().requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return block(x, HEIGHT, WIDTH)[0].sum()

    with torch.no_grad():
        assert not grad(loss)(leaf).requires_grad
    assert not grad(lambda x: torch.no_grad()(loss)(x) + x.sum())(x).sub(1).any()


def test_slices_of_one_model_are_one_call(backend: str) -> None:
    block, x = block_and_images(torch.float32)
    with kernels.use_backend(backend), Calls() as calls:
        vmap(lambda image: block(image[None], HEIGHT, WIDTH)[0])(x)
        q = torch.randn(5, 2, 1, 7, 4)
        gradient = vmap(grad(lambda q, k: kernels.efficient_attention(q, k, k)[0].sum()), in_dims=(0, None))(q, q[0])
    assert gradient.shape == q.shape
    assert calls.seen == [
        ("efficient_self_attention", 3, backend),
        ("mix_ffn", 3, backend),
        ("efficient_attention", 10, backend),
        ("efficient_attention_backward", 10, backend),
    ]


def test_slices_of_several_models_are_calls_of_the_backend(backend: str) -> None:
    x, weights = torch.randn(2, 12, 6), torch.randn(3, 5, 6)
    with kernels.use_backend(backend), Calls() as calls:
        found = vmap(lambda w: kernels.linear(x, w) if backend == "native" else mixed(x, w))(weights)
    assert len(found) == 3
    assert [call[1:] for call in calls.seen] == [(2, backend)] * 3


def mixed(x: Tensor, weight: Tensor) -> Tensor:
    return kernels.mix_ffn(x, 3, 4, weight, None, torch.ones(5, 1, 3, 3), None, torch.ones(6, 5), None)


def test_vmap_of_no_slices(backend: str) -> None:
    block, x = block_and_images(torch.float32)
    with kernels.use_backend(backend):
        output, context = vmap(lambda image: block(image[None], HEIGHT, WIDTH))(x[:0])
        mixed_by = vmap(lambda w: mixed(torch.ones(2, 12, 6), w))(torch.ones(0, 5, 6))
    assert output.shape == (0, 1, 4, 4)
    assert context.shape == (0, 1, 2, 2, 2)
    assert mixed_by.shape == (0, 2, 12, 6)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        ("models", "mix_ffn: vmap: 2 calls, one a slice"),
        ("jvp", "mix_ffn: forward mode, by the reference"),
        ("jacrev_of_jacrev", "mix_ffn: derivative of its backward, by the reference"),
    ],
)
def test_the_log_says_what_is_not_a_call_of_the_backend(
    transform: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    require("native")
    block, x = block_and_images()
    with caplog.at_level(logging.DEBUG, "msformer_kernels"), kernels.use_backend("native"):
        block(x, HEIGHT, WIDTH)[0].sum().backward()
        assert not caplog.messages
        TRANSFORMS[transform](block, x)
    assert message in caplog.messages


@pytest.mark.parametrize("name", ["vmap", "grad", "gradients_by_image"])
def test_compiled_transforms(name: str) -> None:
    require("native")
    torch._dynamo.reset()
    block, x = block_and_images()
    expected = TRANSFORMS[name](block, x)
    compiled = torch.compile(lambda x: TRANSFORMS[name](block, x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)


def test_vmap_under_autocast() -> None:
    require("native")
    block, x = block_and_images(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = block.mlp(x, HEIGHT, WIDTH)
        found = vmap(lambda image: block.mlp(image[None], HEIGHT, WIDTH).squeeze(0))(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)


def test_onnx_export_is_plain_pytorch() -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    block, x = block_and_images(torch.float32)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x, HEIGHT, WIDTH)[0]

    program = torch.onnx.export(Model().eval(), (x,), dynamo=True, verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), block(x, HEIGHT, WIDTH)[0], rtol=1e-4, atol=1e-5)
