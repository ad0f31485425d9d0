"""Steps: what is resumed goes on to the same bits, parts and processes take the same steps, and it learns."""

from __future__ import annotations

import gc
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from msformer.training import checkpoint
from msformer.training.checkpoint import State
from msformer.training.distributed import Processes, SpreadBatchNorm, spread_batch_norms
from msformer.training.objectives import find_objective
from msformer.training.settings import Settings
from msformer.training.trainer import AGREEMENT, Trainer, make_network
from tests.msformer.training.small import small_batches, small_settings
from tests.processes import run_in_processes

RECORD: dict[str, Any] = {"some": "settings"}


def trainer_of(
    settings: Settings,
    state: State | None = None,
    processes: Processes = Processes(),  # noqa: B008
) -> Trainer:
    objective = find_objective(settings.objective, settings.weights)
    return Trainer(settings, objective, state or State(RECORD), torch.device("cpu"), processes)


@pytest.mark.parametrize("objective", ["teacher", "consistency", "published"])
def test_a_training_that_is_stopped_and_resumed_ends_with_the_same_bits(tmp_path: Path, objective: str) -> None:
    settings = small_settings(objective=objective)
    whole = trainer_of(settings)
    assert whole.run(small_batches(settings), lambda state: False)

    first = trainer_of(settings)
    assert not first.run(small_batches(settings), lambda state: state.step >= 10)
    checkpoint.write(first.snapshot(), tmp_path)
    torch.rand(3)  # whatever else happened
    state = checkpoint.read(tmp_path, RECORD)
    assert state is not None
    assert state.step == 10
    second = trainer_of(settings, state)
    assert second.run(small_batches(settings), lambda state: False)

    expected = whole.network.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in second.network.state_dict().items())
    assert second.state.history == whole.state.history
    assert len(whole.state.history[AGREEMENT]) == 20


def test_the_random_state_is_put_back(tmp_path: Path) -> None:
    torch.manual_seed(5)
    checkpoint.write(State(RECORD), tmp_path)
    expected = torch.rand(3)
    checkpoint.read(tmp_path, RECORD)
    assert torch.equal(torch.rand(3), expected)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    checkpoint.write(State({"steps": 20, "seed": 0}), tmp_path)
    with pytest.raises(
        ValueError, match=r"other settings or images \(steps was 20, now 30\); take another folder, or --overwrite"
    ):
        checkpoint.read(tmp_path, {"steps": 30, "seed": 0})
    (tmp_path / checkpoint.CHECKPOINT).write_bytes(b"PK\3\4 not whole")
    with pytest.raises(ValueError, match="damaged, or no checkpoint of a training"):
        checkpoint.read(tmp_path, {"steps": 20, "seed": 0})
    assert checkpoint.read(tmp_path / "nowhere", {}) is None


def test_gradients_of_parts_are_those_of_the_batch() -> None:
    """With statistics of BatchNorm kept still, since each part has its own."""
    gradients = []
    for accumulate in (1, 2):
        settings = small_settings(accumulate=accumulate)
        trainer = trainer_of(settings)
        trainer.network.eval()
        trainer.step(small_batches(settings).make(0))
        gradients.append([p.grad.clone() for p in trainer.trained])  # type: ignore[union-attr]
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_it_learns() -> None:
    settings = small_settings(steps=60, learning_rate=1e-2)
    trainer = trainer_of(settings)
    trainer.run(small_batches(settings), lambda state: False)
    agreement, loss = trainer.state.history[AGREEMENT], trainer.state.history["ce"]
    assert sum(agreement[-10:]) / 10 > 0.75
    assert sum(loss[-10:]) < 0.7 * sum(loss[:10])


def test_bfloat16_takes_nearly_the_same_steps() -> None:
    losses = []
    for precision in ("float32", "bfloat16"):
        settings = small_settings(precision=precision, steps=10)
        trainer = trainer_of(settings)
        trainer.run(small_batches(settings), lambda state: False)
        assert all(p.dtype == torch.float32 for p in trainer.network.parameters())
        losses.append(torch.tensor(trainer.state.history["dice"]))
    assert not torch.equal(*losses)
    torch.testing.assert_close(*losses, rtol=0.05, atol=0.02)


def test_what_no_loss_reaches_is_not_trained() -> None:
    settings = small_settings()
    network = make_network(settings, find_objective("teacher"), torch.device("cpu"))
    fixed = {name.split(".")[0] for name, p in network.named_parameters() if not p.requires_grad}
    assert fixed == {"bn3", "to_patch_embedding"}
    published = make_network(settings, find_objective("published"), torch.device("cpu"))
    assert all(p.requires_grad for p in published.parameters())


def test_the_learning_rate_rises_and_falls() -> None:
    settings = small_settings(steps=100)
    assert settings.rate(0) == pytest.approx(2e-3 / 20)
    assert settings.rate(50) == pytest.approx(1e-3)
    assert settings.rate(50, round=2) == pytest.approx(0.5e-3)
    assert settings.rate(99) < 1e-6


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    settings = small_settings()
    trainer = trainer_of(settings)
    with torch.no_grad():
        trainer.network.linear_down.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="NaN or infinite before step 10; try a smaller learning rate"):
        trainer.run(small_batches(settings), lambda state: False)


def test_a_batch_that_does_not_divide_is_an_error() -> None:
    with pytest.raises(ValueError, match="batch: expected a multiple of 6 for 2 processes, accumulate 3, got 4"):
        small_settings(accumulate=3).check_split(2)


def test_a_batch_norm_of_one_process_is_the_plain_layer() -> None:
    network = make_network(small_settings(), find_objective("teacher"), torch.device("cpu"))
    names = list(network.state_dict())
    image = torch.randn(2, 3, 33, 33)
    expected = network(image, attention=False).logits
    spread_batch_norms(network)
    assert list(network.state_dict()) == names
    assert sum(isinstance(module, SpreadBatchNorm) for module in network.modules()) == 5
    torch.testing.assert_close(network(image, attention=False).logits, expected)


STEPS = 10
SPREAD = ("teacher", "consistency")


def spread_training(rank: int, count: int, folder: Path) -> None:
    """A process of several, whose first writes what came of each objective."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    for objective in SPREAD:
        settings = small_settings(objective=objective, steps=STEPS, accumulate=1)
        trainer = trainer_of(settings, processes=Processes(rank, count, rank))
        trainer.run(small_batches(settings, (rank, count)), lambda state: False)
        # what is left of it would be destroyed after the group, and might wait for gloo's threads for ever
        assert not any(isinstance(found, DistributedDataParallel) for found in gc.get_objects())
        if rank == 0:
            torch.save((trainer.state.history, trainer.network.state_dict()), folder / f"{objective}.pt")
    dist.destroy_process_group()


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    run_in_processes(spread_training, 2, tmp_path)
    for objective in SPREAD:
        history, weights = torch.load(tmp_path / f"{objective}.pt", weights_only=True)
        settings = small_settings(objective=objective, steps=STEPS)
        alone = trainer_of(settings)
        alone.run(small_batches(settings), lambda state: False)
        for name, values in alone.state.history.items():
            torch.testing.assert_close(torch.tensor(history[name]), torch.tensor(values), rtol=1e-4, atol=1e-5)
        network = make_network(settings, find_objective(objective), torch.device("cpu"))
        network.load_state_dict(weights)
        image = torch.randn(2, 3, 49, 49, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            found, expected = (each.eval()(image, attention=False).logits for each in (network, alone.network))
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2 * float(expected.std()))
