"""The fitting loop: what runs on a GPU without the host does the same steps as the plain loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from msformer.fitting import DeviceSteps, History, Rule, _fit_step_by_step
from msformer.model import MSFormer
from msformer.presets import LossWeights


def model_and_image(seed: int = 0) -> tuple[MSFormer, Tensor]:
    torch.manual_seed(seed)
    return MSFormer(embed_dim=6, depth=1).train(), torch.rand(1, 3, 33, 33)


def ignore(step: int, labels: int, loss: float) -> None:
    pass


def both(rule: Rule) -> tuple[History, History, MSFormer, MSFormer]:
    """The plain loop and the steps for the device, called instead of captured."""
    plain, image = model_and_image()
    expected = _fit_step_by_step(plain, image, rule, ignore)
    model, image = model_and_image()
    return expected, DeviceSteps(model, image, rule).run(ignore), plain, model


@pytest.mark.parametrize("weights", [LossWeights(), LossWeights(ce=1, inter=0, intra=0)], ids=["all", "ce"])
def test_steps_on_the_device_are_those_of_the_plain_loop(weights: LossWeights) -> None:
    expected, found, plain, model = both(Rule(weights, 0.1, 0.9, 6, 1))
    assert found.label_counts == expected.label_counts
    torch.testing.assert_close(torch.tensor(found.losses), torch.tensor(expected.losses))
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda m, n=name: f"{n}: {m}")


def test_steps_that_were_launched_after_the_last_one_change_nothing() -> None:
    """The stop rule is met at the first step; the ones launched ahead of the host must not move the weights."""
    expected, found, plain, model = both(Rule(LossWeights(), 0.1, 0.9, 8, 6))
    assert len(found.losses) == len(expected.losses) == 1
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_history_is_reported_in_order() -> None:
    model, image = model_and_image()
    seen: list[tuple[int, int, float]] = []
    found = DeviceSteps(model, image, Rule(LossWeights(), 0.1, 0.9, 5, 1)).run(lambda *row: seen.append(row))
    assert seen == list(zip(range(1, 6), found.label_counts, found.losses, strict=True))


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    model, image = model_and_image()
    image[..., 3, 3] = float("nan")
    with pytest.raises(FloatingPointError, match="the loss became nan at step 1; try a smaller learning rate"):
        DeviceSteps(model, image, Rule(LossWeights(), 0.1, 0.9, 5, 1)).run(ignore)


def test_a_capture_that_fails_leaves_the_weights_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the steps that follow are those without the attempt."""

    class Failing:
        def __init__(self, *args: object, **options: object) -> None:
            pass

        def __enter__(self) -> None:
            raise RuntimeError("operation not permitted when stream is capturing")

        def __exit__(self, *error: object) -> None:
            pass

    for name, value in (
        ("CUDAGraph", lambda: None),
        ("current_stream", lambda: None),
        ("set_stream", lambda stream: None),
        ("graph", Failing),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    rule = Rule(LossWeights(), 0.1, 0.9, 3, 1)
    model, image = model_and_image()
    steps = DeviceSteps(model, image, rule)
    with pytest.raises(RuntimeError, match="not permitted"):
        steps.capture()
    expected, image = model_and_image()
    for (name, value), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    assert not steps.started
    assert steps.run(ignore).label_counts == _fit_step_by_step(expected, image, rule, ignore).label_counts
