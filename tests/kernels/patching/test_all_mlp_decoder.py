"""The all-MLP decoder: what is found and proved, what is left alone, and its error in each precision."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import msformer_kernels as kernels
from tests.kernels.patching.models import decoders

CHANNELS = (4, 6, 8)


def features(dtype: torch.dtype = torch.float64, count: int = 3, seed: int = 0) -> list[Tensor]:
    """Of three scales; the largest is 12 x 10, not a multiple of the smallest."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((12, 10), (6, 5), (3, 3), (2, 2))[:count]
    shapes = [(2, c, *size) for c, size in zip((*CHANNELS, 8), sizes, strict=False)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def with_image(given: list[Tensor], empty: bool) -> list[Tensor]:
    image = torch.randn(2, 3, 48, 40, dtype=given[0].dtype)
    return [image, *[image.new_empty(2, 0, 24, 20)] * empty, *given]


def patched(model: nn.Module) -> nn.Module:
    found = copy.deepcopy(model)
    report = kernels.patch(found)
    assert [row.by for row in report.replaced] == ["all-MLP decoder"], str(report)
    return found


def concatenations(model: nn.Module, given: Any) -> int:
    """How often a call concatenates, which the plan does not."""
    calls: list[nn.Module] = []

    class Counted(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.cat:
                calls.append(model)
            return func(*args, **(kwargs or {}))

    with Counted():
        model(given)
    return len(calls)


def results(model: nn.Module, given: list[Tensor]) -> list[Tensor]:
    """Output, then the gradients of inputs and parameters."""
    inputs = [x.detach().clone().requires_grad_() for x in given]
    torch.manual_seed(1)
    output = model(inputs)
    wanted = [x for x in inputs if x.numel() and x.shape[1] != 3] + list(model.parameters())
    given_back = torch.randn(output.shape, dtype=output.dtype)  # not randn_like, which draws in the order of memory
    return [output.detach(), *torch.autograd.grad((output * given_back).sum(), wanted)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", [decoders.AllMLPDecoder, lambda: decoders.AllMLPDecoder(hidden=40, dropout=0.0)])
@pytest.mark.parametrize("batch", [1, 2])
def test_it_computes_the_same_before_upsampling(make: Callable[[], nn.Module], batch: int, training: bool) -> None:
    """In training, too, where dropout draws in the order of memory."""
    model = make().double().train(training)
    ours, given = patched(model), [x[:batch] for x in features()]
    assert concatenations(ours, given) == 0
    for found, exact in zip(results(ours, given), results(model, given), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("empty", [False, True])
def test_the_image_may_come_first(empty: bool) -> None:
    model = decoders.ImageFirstDecoder().double()
    given = with_image(features(), empty)
    ours = patched(model)
    assert concatenations(ours, given) == 0
    for found, exact in zip(results(ours, given), results(model, given), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


def test_dropout_and_batch_statistics_are_proved_in_training() -> None:
    model = decoders.AllMLPDecoder()
    report = kernels.patch(model)
    assert report.replaced[0].note == "", str(report)
    model.train()
    assert concatenations(model, features(torch.float32)) == 0
    assert int(model.batch_norm.num_batches_tracked) == 1


class ActivatedBetween(decoders.AllMLPDecoder):
    """OpenMMLab's head has a ReLU there."""

    def projected(self, projection: nn.Module, x: Tensor) -> Tensor:
        return super().projected(projection, x).relu()


class AlignedCorners(decoders.AllMLPDecoder):
    ALIGN = True


class Undropped(decoders.AllMLPDecoder):
    """Draws random numbers, as dropout does, in another place."""

    def projected(self, projection: nn.Module, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().projected(projection, x), 0.1, self.training)


@pytest.mark.parametrize("make", [ActivatedBetween, AlignedCorners])
def test_what_looks_alike_is_left_alone(make: type[nn.Module]) -> None:
    with pytest.warns(UserWarning, match="all-MLP decoder .* comes nearest"):
        report = kernels.patch(make())
    assert not report.replaced


def test_other_random_numbers_keep_its_forward_in_training() -> None:
    model = Undropped(dropout=0.0)
    report = kernels.patch(model)
    assert "it draws random numbers" in report.replaced[0].note
    assert concatenations(model.train(), features(torch.float32)) == 1
    assert concatenations(model.eval(), features(torch.float32)) == 0


@pytest.mark.parametrize("count", [2, 4])
def test_another_number_of_scales_runs_its_own_forward(count: int) -> None:
    model = decoders.AllMLPDecoder().double().eval()
    given, exact = features(count=count), None
    if count == 4:  # the module passes over the last
        exact = model(given)
    ours = patched(model)
    if exact is None:
        with pytest.raises(RuntimeError, match="channels"):
            ours(given)
    else:
        torch.testing.assert_close(ours(given), exact)


def test_hooks_count() -> None:
    model = patched(decoders.AllMLPDecoder().eval())
    calls: list[int] = []
    for layer in (model.linear_c[1].proj, model.batch_norm):
        layer.register_forward_hook(lambda *_: calls.append(1))
    model(features(torch.float32))
    assert len(calls) == 2


@pytest.mark.parametrize("how", ["float32", "bfloat16", "float16", "autocast"])
def test_the_error_is_no_larger_than_that_of_eager(how: str) -> None:
    """RMS over several draws, against float64."""
    dtype = getattr(torch, how) if how != "autocast" else torch.float32
    errors = {"eager": 0.0, "ours": 0.0}
    for seed in range(4):
        torch.manual_seed(seed)
        model = decoders.AllMLPDecoder(channels=(16, 24, 32), hidden=32, dropout=0.0).to(dtype).eval()
        given = [torch.randn(1, c, s, s, dtype=dtype) for c, s in ((16, 16), (24, 8), (32, 4))]
        exact = results(copy.deepcopy(model).double(), [x.double() for x in given])
        for name, rival in (("eager", model), ("ours", patched(model))):
            with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
                found = results(rival, given)
            errors[name] += sum(float(((f - e).norm() / e.norm()) ** 2) for f, e in zip(found, exact, strict=True))
    assert errors["ours"] <= 1.25**2 * errors["eager"], errors


def test_the_output_has_the_dtype_and_layout_of_the_original() -> None:
    model = decoders.AllMLPDecoder().eval()
    ours = patched(model)
    assert ours(features(torch.float32)).stride() == model(features(torch.float32)).stride()
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(features(torch.float32)).dtype == model(features(torch.float32)).dtype == torch.bfloat16


def test_compiled_vmapped_and_pickled() -> None:
    import pickle

    model = decoders.AllMLPDecoder().double().eval()
    ours: Any = pickle.loads(pickle.dumps(patched(model)))
    exact = model(features())
    compiled: Any = torch.compile(ours, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(features()), exact)
    stacked = [torch.stack([x, 2 * x]) for x in features()]
    torch.testing.assert_close(torch.vmap(ours)(stacked)[0], exact)


def test_the_meta_device_gives_shapes() -> None:
    model = patched(decoders.AllMLPDecoder().eval()).to("meta")
    assert model([x.to("meta") for x in features(torch.float32)]).shape == (2, 3, 12, 10)


def test_autocast_leaves_float64() -> None:
    model = decoders.AllMLPDecoder(hidden=40).double().eval()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(patched(model)(features()), model(features()), rtol=1e-10, atol=1e-10)
