"""DeepCluster and IIC on one image: their parts against plain definitions, and that they run on anything."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from msformer.baselines import Task, deepcluster, iic
from msformer.io.prepare import prepare_image
from tests.msformer.evaluation.data import disc, lesion


@pytest.fixture(params=[deepcluster, iic], ids=["deepcluster", "iic"])
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> object:
    """With few steps, on few pixels."""
    monkeypatch.setattr(deepcluster, "ROUNDS", 3)
    monkeypatch.setattr(iic, "STEPS", 4)
    monkeypatch.setattr(iic, "SIDE", 33)
    return request.param


def task(image: Tensor, seed: int = 0) -> Task:
    return Task(image, True, seed, torch.device("cpu"))


@pytest.mark.parametrize("shape", [(33, 33), (34, 51), (70, 33)])
def test_the_same_map_for_the_same_seed(module: object, shape: tuple[int, int]) -> None:
    image = prepare_image(lesion(disc(*shape)))
    state = torch.random.get_rng_state()
    found, again = (module.label_map(task(image)).labels for _ in range(2))  # type: ignore[attr-defined]
    assert found.shape == shape
    assert found.min() >= 0
    assert (found == again).all()
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_constant_image(module: object) -> None:
    found = module.label_map(task(torch.full((3, 33, 40), 0.3)))  # type: ignore[attr-defined]
    assert found.labels.shape == (33, 40)


def test_steps_are_reported(module: object) -> None:
    seen: list[tuple[int, int]] = []
    given = Task(torch.rand(3, 33, 33), True, 0, torch.device("cpu"), lambda *step: seen.append(step))
    found = module.label_map(given)  # type: ignore[attr-defined]
    assert seen == [(i + 1, found.steps) for i in range(found.steps)]


def test_whitened_features() -> None:
    random = np.random.default_rng(0)
    features = (random.normal(size=(500, 6)) @ random.normal(size=(6, 6))).astype(np.float32)
    features = np.concatenate([features, features[:, :2]], axis=1)  # of rank 6
    found = deepcluster.whitened(features)
    assert found.shape == (500, 6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    centred = features - features.mean(0)
    values = np.linalg.svd(centred, full_matrices=False)[0][:, :6]  # variance 1 up to a factor and a rotation
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    np.testing.assert_allclose(found @ found.T, values @ values.T, atol=1e-3)
    assert not deepcluster.whitened(np.ones((9, 4), np.float32)).any()


def test_every_cluster_has_the_same_weight() -> None:
    logits = torch.randn(1, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(1, 4, 5, dtype=torch.int64)
    labels[0, 0, 0] = 2  # one pixel, and cluster 1 has none
    losses = F.cross_entropy(logits, labels, reduction="none")
    expected = (losses[labels == 0].mean() + losses[labels == 2].mean()) / 2
    assert deepcluster.balanced_cross_entropy(logits, labels).item() == pytest.approx(expected.item())


def literal_loss(first: Tensor, second: Tensor, reach: int) -> float:
    clusters, height, width = first.shape[1:]
    total, count = 0.0, 0
    for down in range(-reach, reach + 1):
        for right in range(-reach, reach + 1):
            joint = torch.zeros(clusters, clusters, dtype=torch.float64)
            for row in range(height):
                for column in range(width):
                    if 0 <= row + down < height and 0 <= column + right < width:
                        joint += torch.outer(first[0, :, row, column], second[0, :, row + down, column + right])
            joint = joint / joint.sum()
            joint = (joint + joint.T) / 2
            rows, columns = joint.sum(1, keepdim=True), joint.sum(0, keepdim=True)
            total -= (joint * (joint.log() - rows.log() - columns.log())).sum().item()
            count += 1
    return total / count


def test_information_loss_against_its_definition() -> None:
    random = torch.Generator().manual_seed(0)
    first, second = (torch.randn(1, 3, 5, 6, dtype=torch.float64, generator=random).softmax(1) for _ in range(2))
    assert iic.information_loss(first, second, 2).item() == pytest.approx(literal_loss(first, second, 2))


def test_information_is_greatest_for_equal_certain_and_balanced_clusters() -> None:
    labels = torch.arange(36).reshape(1, 6, 6) % 3
    certain = F.one_hot(labels, 3).permute(0, 3, 1, 2).double()
    assert iic.information_loss(certain, certain, 0).item() == pytest.approx(-math.log(3))
    unsure = torch.full_like(certain, 1 / 3)
    assert iic.information_loss(unsure, unsure, 0).item() == pytest.approx(0, abs=1e-12)


def test_information_loss_has_the_right_gradient() -> None:
    random = torch.Generator().manual_seed(0)
    logits = [torch.randn(1, 3, 4, 4, dtype=torch.float64, generator=random, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda a, b: iic.information_loss(a.softmax(1), b.softmax(1), 1), logits)


def test_jitter_changes_colours_within_bounds() -> None:
    image = torch.rand(1, 3, 8, 9, generator=torch.Generator().manual_seed(1))
    random = torch.Generator().manual_seed(0)
    found = [iic.jitter(image, random) for _ in range(20)]
    assert all(x.shape == image.shape and x.min() >= 0 and x.max() <= 1 for x in found)
    assert len({float(x.sum()) for x in found}) == 20
    grey = image.mean(1, keepdim=True).expand(1, 3, 8, 9)
    changed = iic.jitter(grey, random)
    torch.testing.assert_close(changed[:, :1].expand_as(changed), changed, msg="grey stays grey")


def test_a_step_of_iic_lowers_its_loss() -> None:
    torch.manual_seed(0)
    network, image = iic.Network(), prepare_image(lesion(disc(24, 24, 6)))[None]
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    losses = []
    for _ in range(6):
        found = network(torch.cat([image, image.flip(3)]), 0, (24, 24))
        loss = iic.information_loss(found[:1], found[1:].flip(3), 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
