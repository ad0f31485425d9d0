"""Each loss beside a few plain lines that say the same, and the shares of a batch that is split."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from msformer.model import MSFormer, MSFormerOutput
from msformer.training.objectives import OBJECTIVES, Shares, Targets, find_objective


def output(logits: Tensor, **more: Tensor) -> MSFormerOutput:
    empty = torch.empty(0)
    return MSFormerOutput(logits, *(more.get(name, empty) for name in MSFormerOutput._fields[1:]))


def batch(images: int = 3, size: int = 5, clusters: int = 2) -> tuple[Tensor, Targets, Shares]:
    """Logits, targets and weights of random pixels."""
    random = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(images, clusters, size, size, generator=random)
    target = torch.randint(0, 2, (images, size, size), generator=random).float()
    weight = torch.rand(images, size, size, generator=random)
    return logits, Targets(target, weight), Shares(images, weight.sum(), 1, 1)


def test_cross_entropy_is_the_weighted_mean_over_all_pixels() -> None:
    logits, targets, shares = batch()
    total = weight = 0.0
    for image in range(3):
        for pixel in range(25):
            pair = logits[image].flatten(1)[:, pixel]
            chosen = pair[int(targets.target[image].flatten()[pixel])]
            w = float(targets.weight[image].flatten()[pixel])
            total += w * (math.log(sum(math.exp(v) for v in pair.tolist())) - float(chosen))
            weight += w
    found = OBJECTIVES["teacher"].terms["ce"](output(logits), targets, shares)
    assert float(found) == pytest.approx(total / weight, rel=1e-5)


def test_soft_dice_is_a_mean_over_images() -> None:
    logits, (target, weight), shares = batch()
    p = 1 / (1 + (logits[:, 0] - logits[:, 1]).exp())
    each = [
        (2 * (w * q * t).sum() + 10) / ((w * (q + t)).sum() + 10) for q, t, w in zip(p, target, weight, strict=True)
    ]
    found = OBJECTIVES["teacher"].terms["dice"](output(logits), Targets(target, weight), shares)
    assert float(found) == pytest.approx(1 - float(sum(each)) / 3, rel=1e-5)


def test_pixels_without_weight_do_not_count() -> None:
    logits, (target, weight), _ = batch()
    weight[:, 2:] = 0
    shares = Shares(3, weight.sum(), 1, 1)
    changed = torch.cat([logits[:, :, :2], 9 - logits[:, :, 2:]], dim=2)
    for name, term in OBJECTIVES["teacher"].terms.items():
        first, second = (float(term(output(x), Targets(target, weight), shares)) for x in (logits, changed))
        assert first == pytest.approx(second, rel=1e-6), name


def test_mutual_information_by_its_formula() -> None:
    logits, targets, shares = batch(images=4, clusters=3)
    p = logits.softmax(1)
    joint = torch.zeros(3, 3)
    for c in range(3):
        for d in range(3):
            joint[c, d] = (p[:2, c] * p[2:, d]).mean()
    joint = (joint + joint.T) / 2
    rows, columns = joint.sum(1), joint.sum(0)
    expected = 0.0
    for c in range(3):
        for d in range(3):
            expected -= float(joint[c, d] * (joint[c, d].log() - 1.1 * rows[c].log() - 1.1 * columns[d].log()))
    found = OBJECTIVES["consistency"].terms["mutual"](output(logits), targets, shares)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_information_is_least_where_both_lights_agree_on_clusters_of_equal_size() -> None:
    """-I of n clusters that agree is -(2 * 1.1 - 1) ln n; of a single cluster 0."""
    labels = torch.arange(4).repeat(2, 1, 1).transpose(1, 2).expand(2, 4, 4)
    sure = 50 * torch.nn.functional.one_hot(labels, 4).permute(0, 3, 1, 2).float()
    none = torch.zeros_like(sure)
    none[:, 0] = 50
    term = OBJECTIVES["consistency"].terms["mutual"]
    _, targets, shares = batch()
    assert float(term(output(sure), targets, shares)) == pytest.approx(-1.2 * math.log(4), abs=1e-4)
    assert float(term(output(none), targets, shares)) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("name", ["teacher", "published"])
def test_shares_of_parts_add_up_to_the_loss_of_the_batch(name: str) -> None:
    """But for the published losses, whose parts are alike in size: their mean."""
    torch.manual_seed(0)
    objective = OBJECTIVES[name]
    model = MSFormer(3, 8, 2, 1).eval()
    images, (_, (target, weight), _) = torch.randn(4, 3, 33, 33), batch(4, 33)
    whole = model(images)
    losses = objective.losses(whole, Targets(target, weight), Shares(4, weight.sum(), 1, 1))
    parts: dict[str, Tensor] = {}
    for half in (slice(0, 2), slice(2, 4)):
        part = MSFormerOutput(*(x[half] for x in whole))
        shares = Shares(4, weight.sum(), 2, 1)
        for term, loss in objective.losses(part, Targets(target[half], weight[half]), shares).items():
            parts[term] = parts.get(term, torch.zeros(())) + loss
    for term, loss in losses.items():
        torch.testing.assert_close(parts[term], loss, msg=lambda m, t=term: f"{t}: {m}")


def test_terms_of_weight_zero_are_not_computed() -> None:
    objective = find_objective("published", {"intra": 0})
    assert not objective.needs_attention
    assert objective.used == ("ce", "inter")
    assert OBJECTIVES["published"].needs_attention


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("other", {}, "objective: unknown 'other'; expected one of teacher"),
        ("teacher", {"inter": 1}, "weights: teacher has no inter; expected some of ce, dice"),
        ("teacher", {"ce": -1}, "weights: ce is -1"),
        ("teacher", {"ce": 0, "dice": 0}, "weights: all losses are switched off"),
    ],
)
def test_bad_weights_are_errors(name: str, weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_objective(name, weights)
