"""The published structures compute what ours compute, and the backends are who they say they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import msformer_kernels as kernels
from benchmarks.cases import LAYERS, Case, Shape
from benchmarks.measure import deviation
from benchmarks.published import PublishedMSFormer
from benchmarks.rivals import backend_of, backends, mode, running, uses_autocast
from benchmarks.workloads import OURS, PUBLISHED, Layer, Step, make_candidate, seeded_module
from msformer.losses import total_loss
from msformer.model import MSFormer
from msformer.presets import LossWeights

GOLDEN = Path(__file__).parent.parent / "data" / "msformer_65px_12ch_2layers.safetensors"
ODD = Shape(2, 7, 5, 12, 2, 20)


@pytest.mark.parametrize("operation", LAYERS)
def test_published_layers_equal_ours_in_float64(operation: str) -> None:
    ours = seeded_module(Case(operation, ODD, "float32", "training")).double()
    published = PUBLISHED[operation](ODD).double()
    published.load_state_dict(ours.state_dict(), strict=True)
    tokens = torch.randn(2, 35, 12, dtype=torch.float64)
    gradient = torch.randn_like(tokens)
    channels_first = operation in ("attention", "block")
    found = []
    for module, as_image in ((ours, False), (published, channels_first)):
        x = tokens.clone().requires_grad_()
        given = x.transpose(1, 2).unflatten(2, (7, 5)) if as_image else x
        with kernels.use_backend("reference"):
            outputs = module(given, 7, 5)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        output = outputs[0].flatten(2).transpose(1, 2) if as_image else outputs[0]
        output.backward(gradient)
        found.append([output, *outputs[1:], x.grad, *(parameter.grad for parameter in module.parameters())])
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_published_model_has_the_golden_values() -> None:
    golden = load_file(GOLDEN)
    model = PublishedMSFormer(Shape(1, 65, 65, 12), depth=2).double()
    model.load_state_dict(
        {name.removeprefix("weight."): value for name, value in golden.items() if name.startswith("weight.")},
        strict=True,
    )
    output = model(golden["input.image"].double())
    for name, value in output._asdict().items():
        torch.testing.assert_close(value, golden[f"output.{name}"], rtol=1e-9, atol=1e-11)
    loss = total_loss(output, output.logits.argmax(1), LossWeights())
    assert loss.item() == pytest.approx(golden["loss.total"].item(), rel=1e-10)
    loss.backward()
    for name, parameter in model.named_parameters():
        expected = golden[f"grad.{name}"]  # stored rounded to float32
        tolerance = max(1e-7 * expected.abs().max().item(), 1e-12)
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=tolerance, check_dtype=False)


def test_published_model_equals_ours_at_sizes_that_were_not_published() -> None:
    torch.manual_seed(0)
    ours = MSFormer(embed_dim=6, depth=1).double()
    published = PublishedMSFormer(Shape(1, 70, 37, 6), depth=1).double()
    published.load_state_dict(ours.state_dict(), strict=True)
    image = torch.rand(2, 3, 70, 37, dtype=torch.float64)
    for model in (ours, published):
        with kernels.use_backend("reference"):
            output = model(image)
        total_loss(output, output.logits.argmax(1), LossWeights()).backward()
    for one, other in zip(ours.parameters(), published.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("passes", ["forward", "training"])
@pytest.mark.parametrize("operation", LAYERS)
def test_every_rival_is_right(operation: str, passes: str, dtype: str) -> None:
    case = Case(operation, ODD, dtype, passes)
    exact = make_candidate(case, "exact")
    exact.run()
    for rival in ("published", "eager", *backends()):
        candidate = make_candidate(case, rival)
        candidate.run()
        found = deviation(candidate.results(), exact.results(), case.type, case.joins_gradients)
        assert found.is_right, (rival, found)
        # far from right with the results of other inputs
        other = {name: value.roll(1, 0) for name, value in candidate.results().items()}
        assert not deviation(other, exact.results(), case.type, case.joins_gradients).is_right


def test_results_hold_every_gradient() -> None:
    case = Case("block", ODD, "float32", "training")
    candidate = Layer(case, "eager")
    candidate.run()
    results = candidate.results()
    names = {f"grad.{name}" for name, _ in OURS["block"](ODD).named_parameters()}
    assert results.keys() == {"output", "context", "input gradient"} | names
    candidate.clear()
    assert candidate.input.grad is None
    assert candidate.outputs == ()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_agree_and_train(dtype: str) -> None:
    case = Case("step", Shape(1, 34, 33, 8), dtype, "training")
    exact = make_candidate(case, "exact")
    exact.run()
    for rival in ("published", "eager", *backends()):
        candidate = Step(case, rival)
        before = [parameter.detach().clone() for parameter in candidate.model.parameters()]
        candidate.run()
        assert deviation(candidate.results(), exact.results(), case.type, case.joins_gradients).is_right, rival
        moved = zip(before, candidate.model.parameters(), strict=True)
        assert any(not torch.equal(old, new) for old, new in moved)


def test_images_agree_in_their_first_loss() -> None:
    case = Case("image", Shape(1, 34, 33, 8), "float32", "training")
    exact = make_candidate(case, "exact")
    exact.run()
    for rival in ("published", "eager", *backends()):
        candidate = make_candidate(case, rival)
        for _ in range(2 if rival == "published" else 1):  # whose kept model begins anew
            candidate.run()
            assert deviation(candidate.results(), exact.results(), "float32 highest", joined=True).is_right, rival


def test_each_rival_runs_on_its_backend() -> None:
    from msformer_kernels.core.backends import resolve

    for rival in ("published", "eager", "compile", "exact", *backends()):
        with running(rival, "float32"):
            assert resolve(None, "cpu", torch.float32) == backend_of(rival)
    assert [backend_of(name) for name in ("eager", "native", "native exact")] == ["reference", "native", "native"]


def test_bfloat16_is_autocast_for_the_plain_forms_alone() -> None:
    assert uses_autocast("eager", "bfloat16", whole_model=False)
    assert not uses_autocast("native", "bfloat16", whole_model=False)
    assert uses_autocast("native", "bfloat16", whole_model=True)
    assert not uses_autocast("exact", "bfloat16", whole_model=True)
    assert mode("native", "bfloat16", whole_model=False) == "bfloat16 tensors"
