"""Targets of further rounds: what network and rules see together, as in a prediction."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from msformer import MSFormer
from msformer.training import rounds
from msformer.training.domains import GENERIC, Kind
from msformer.training.lessons import Lesson, Pool, make_pool
from msformer.training.rounds import taught_again
from tests.msformer.evaluation.data import disc

SIDE = 129
OBJECT = disc(SIDE, SIDE, 30)
HALF = OBJECT & (np.arange(SIDE) < SIDE // 2)


def lesson(seen: NDArray[np.bool_]) -> Lesson:
    """Of three teachers that agree."""
    image = np.full((3, SIDE, SIDE), 128, np.uint8)
    return Lesson(image, (3 * seen).astype(np.uint8), 3, 1.0, Kind(False, False), "")


def again(monkeypatch: pytest.MonkeyPatch, probability: float, seen: NDArray[np.bool_]) -> Pool:
    """The next round of one image, whose object the network sees with a probability, and rules somewhere."""
    found = np.where(OBJECT, probability, 1 - probability).astype(np.float32)
    monkeypatch.setattr(rounds, "object_probability", lambda *arguments: found)
    lessons = {"image": lesson(seen)}
    return taught_again(MSFormer(3, 4, 2, depth=1), make_pool(lessons), lessons, GENERIC)


def test_a_sure_network_teaches_itself_what_rules_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = again(monkeypatch, 0.99, HALF)
    assert np.array_equal(pool.target[0].numpy() > 0, OBJECT)
    assert (pool.weight == 255).all()


def test_images_on_which_an_unsure_network_is_alone_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(again(monkeypatch, 0.6, OBJECT)) == 1
    with pytest.raises(ValueError, match="agree on none of 1 images"):
        again(monkeypatch, 0.6, HALF)
