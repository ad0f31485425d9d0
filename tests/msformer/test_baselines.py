"""The methods MS-Former is compared with: one interface, the same map for the same seed, and their losses."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from msformer.baselines import LabelMap, Method, Task, all_methods, choose_methods
from msformer.baselines.kmeans import pixel_features
from msformer.baselines.ms_former import label_map
from msformer.baselines.pixel_network import Fit, continuity, pixel_network, self_labelling
from msformer.baselines.sgscn import context_consistency
from msformer.io.prepare import prepare_image
from msformer.presets import PUBLISHED, QUICK, SMOOTH, LossWeights, Preset
from msformer.scoring import dice, oracle_union
from msformer.segmentation import segment
from tests.msformer.evaluation.data import disc, lesion, save

TRUTH = disc(36, 40, 9)
SHORT = replace(SMOOTH, max_steps=5)
SLOW = {"deepcluster", "iic", "ms-former-published"}


def task(seed: int = 0, **changes: object) -> Task:
    given = {"image": prepare_image(lesion(TRUTH)), "colour": True, "seed": seed, "device": torch.device("cpu")}
    return Task(**(given | changes))  # type: ignore[arg-type]


def found_by(method: Method, given: Task) -> LabelMap:
    return method.label_map(given)


def short(method: Method) -> Method:
    """The same with few steps."""
    call: Any = method.label_map
    if isinstance(call, partial) and "settings" in call.keywords:
        settings = replace(call.keywords["settings"], max_steps=5)
        return replace(method, label_map=partial(call.func, settings=settings))
    fit = getattr(call, "__self__", None)
    return replace(method, label_map=replace(fit, max_steps=5).label_map) if isinstance(fit, Fit) else method


FAST = [short(method) for method in all_methods() if method.name not in SLOW and 1 in method.tables]


@pytest.mark.parametrize("method", FAST, ids=lambda m: m.name)
def test_every_method_has_the_same_interface(method: Method) -> None:
    state = torch.random.get_rng_state()
    found, again = (found_by(method, task()) for _ in range(2))
    assert found.labels.shape == TRUTH.shape
    assert found.labels.dtype.kind in "iu"
    assert found.labels.min() >= 0
    assert (found.labels == again.labels).all(), "the same seed, the same map"
    assert torch.equal(state, torch.random.get_rng_state()), "the global random state is left alone"


@pytest.mark.parametrize("method", FAST, ids=lambda m: m.name)
def test_grey_and_constant_images(method: Method) -> None:
    grey = prepare_image(lesion(TRUTH)[..., 0])
    assert found_by(method, task(image=grey, colour=False)).labels.shape == TRUTH.shape
    constant = torch.full((3, 36, 40), 0.4)
    assert found_by(method, task(image=constant, colour=False)).labels.shape == TRUTH.shape


@pytest.mark.parametrize("name", ["otsu", "kmeans-2", "kmeans-3"])
def test_an_easy_image(name: str) -> None:
    (method,) = choose_methods([name])
    assert dice(oracle_union(found_by(method, task()).labels, TRUTH), TRUTH) > 0.95


def test_sgscn_finds_an_easy_image_from_most_seeds() -> None:
    """By rounding alone, so on another processor, its training may end with one label for all."""
    (method,) = choose_methods(["sgscn"])
    found = [dice(oracle_union(found_by(method, task(seed=seed)).labels, TRUTH), TRUTH) for seed in range(5)]
    assert sorted(found)[2] > 0.6, found


def test_order_and_choice() -> None:
    names = [method.name for method in all_methods()]
    assert names[:2] == ["everything", "otsu"]
    chosen = [method.name for method in choose_methods(("all",))]
    assert chosen[-1] == "ms-former"
    assert {"kmeans-3", "kim", "sgscn"} <= set(chosen)
    assert "ms-former-published" not in chosen
    both = choose_methods(("all", "ms-former-published"))
    assert [method.name for method in both[-2:]] == ["ms-former-published", "ms-former"]
    assert [m.name for m in choose_methods(("ms-former", "otsu"))] == ["otsu", "ms-former"]
    assert choose_methods(("all", "otsu")) == choose_methods(("all",))
    table_2 = [m.name for m in choose_methods(("all",), ablation=True)]
    ablations = [f"ms-former-{name}" for name in ("ce", "ce-inter", "ce-intra", "published")]
    assert table_2 == ["everything", "otsu", *ablations]
    with pytest.raises(ValueError, match="methods: unknown 'unet'; expected some of all, everything, otsu"):
        choose_methods(("otsu", "unet"))


def test_settings_of_ms_former(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def fit_image(image: Tensor, settings: Preset, *others: object) -> None:
        seen[method.name] = settings
        raise InterruptedError

    monkeypatch.setattr("msformer.baselines.ms_former.fit_image", fit_image)
    for method in all_methods():
        if method.name.startswith("ms-former"):
            with pytest.raises(InterruptedError):
                method.label_map(task())
    assert seen["ms-former-quick"] == QUICK
    assert seen["ms-former"] == replace(SMOOTH, size=None)
    published = replace(PUBLISHED, size=None)
    assert seen["ms-former-published"] == published
    for name, weights in (("ce", (1, 0, 0)), ("ce-inter", (1, 1.5, 0)), ("ce-intra", (1, 0, 1.3))):
        assert seen[f"ms-former-{name}"] == replace(published, weights=LossWeights(*weights))


def test_ms_former_is_what_segment_does(tmp_path: Path) -> None:
    """On the file itself: an image without black and white is not stretched."""
    save(tmp_path / "dull.png", lesion(TRUTH) // 4 + 90)
    for size in (None, 45):
        found = label_map(task(image=prepare_image(tmp_path / "dull.png"), seed=2), replace(SHORT, size=size))
        expected = segment(tmp_path / "dull.png", size=size, max_steps=SHORT.max_steps, seed=2)
        assert (found.labels == expected.labels_full).all()
        assert found.steps == expected.steps


def test_pixel_features() -> None:
    assert pixel_features(task(), 0).shape == (36 * 40, 3)
    assert pixel_features(task(colour=False), 0).shape == (36 * 40, 1)
    weighted = pixel_features(task(), 0.5)
    assert weighted.shape == (36 * 40, 5)
    assert weighted[:, 3:].max() == pytest.approx(100 * 0.5 * 39 / 40)


def test_continuity() -> None:
    logits = torch.zeros(1, 2, 3, 4)
    logits[:, 0, 0] = 1.0
    assert continuity(logits).item() == pytest.approx(4 / (2 * 2 * 4))
    assert continuity(logits.transpose(2, 3)).item() == pytest.approx(4 / (2 * 2 * 4))
    torch.autograd.gradcheck(continuity, torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True))


def test_self_labelling_is_cross_entropy_against_the_argmax() -> None:
    logits = torch.randn(1, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    assert self_labelling(logits).item() == pytest.approx(-logits.log_softmax(1).amax(1).mean().item(), rel=1e-6)


def test_context_consistency_against_its_definition() -> None:
    logits = torch.randn(1, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    probabilities = logits.softmax(1)[0]
    expected = 0.0
    for p in probabilities:
        p = p / p.sum()
        rows, columns = torch.meshgrid(torch.linspace(-1, 1, 4), torch.linspace(-1, 1, 5), indexing="ij")
        for positions in (rows.double(), columns.double()):
            mean = (p * positions).sum()
            expected += (p * (positions - mean) ** 2).sum().item()
    assert context_consistency(logits.float()).item() == pytest.approx(expected, rel=1e-5)


def test_a_fit_stops_when_few_labels_are_left_and_reports_its_steps() -> None:
    steps: list[tuple[int, int]] = []
    given = task(report=lambda *step: steps.append(step))
    found = Fit(self_labelling, max_steps=4, min_labels=1).label_map(given)
    assert found.steps == 4
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert Fit(self_labelling, max_steps=4, min_labels=100).label_map(given).steps == 0


def test_pixel_network_has_the_published_shape() -> None:
    network = pixel_network()
    assert network(torch.rand(1, 3, 9, 7)).shape == (1, 100, 9, 7)
    assert sum(p.numel() for p in network.parameters()) == 27 * 100 + 900 * 100 + 100 * 100 + 3 * 100 + 3 * 200


def test_a_report_that_raises_ends_a_fit() -> None:
    def stop(done: int, steps: int) -> None:
        raise KeyboardInterrupt

    for name in ("sgscn", "ms-former"):
        with pytest.raises(KeyboardInterrupt):
            found_by(choose_methods([name])[0], task(report=stop))


def test_labels_of_kmeans_are_at_most_the_distinct_colours() -> None:
    image = torch.zeros(3, 33, 33)
    image[:, :10] = 1.0
    for name in ("kmeans-2", "kmeans-3"):
        labels = found_by(choose_methods([name])[0], task(image=image)).labels
        assert len(np.unique(labels)) == 2
