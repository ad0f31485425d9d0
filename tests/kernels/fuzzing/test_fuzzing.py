"""300 calls of the fuzzer, and those that it found wrong once, by the coarse rule, which holds on every processor.
`make fuzz` makes 10,000, shared among the variants, by the sharp one."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from tests.kernels.cases import require
from tests.kernels.fuzzing import judge
from tests.kernels.fuzzing.recipe import DEFAULTS, Recipe, draw
from tests.kernels.fuzzing.search import judged, made_smaller, search
from tests.kernels.ops import shared

FOUND = [
    line for line in Path(__file__).with_name("found.txt").read_text().splitlines() if line and not line.startswith("#")
]
CASES = 300


@pytest.mark.parametrize("first", range(0, CASES, 50))
def test_random_calls(first: int, threads: None) -> None:
    require("native")
    recipes = (draw(19, number) for number in range(first, first + 50))
    found = search(recipes, time.monotonic() + 100, shrink=False, coarse=True)
    assert not found.failures
    assert not found.stopped
    assert found.counts.total() == 50


@pytest.mark.parametrize("line", FOUND, ids=[line.partition(" ")[0] for line in FOUND])
def test_what_was_found(line: str, threads: None) -> None:
    recipe = Recipe.parse(line)
    require(recipe["backend"])
    assert judged(recipe, coarse=True) == []


def test_a_recipe_is_read_as_it_was_written() -> None:
    for number in range(50):
        recipe = draw(3, number, ("native", "cuda", "triton"), "avx2")
        again = Recipe.parse(str(recipe))
        assert again == recipe
        a, b = recipe.case().draw(), again.case().draw()
        assert all(x is None or torch.equal(x.nan_to_num(), b[name].nan_to_num()) for name, x in a.items())
    with pytest.raises(ValueError, match=r"expected one of batch_norm, .* first, got 'conv'"):
        Recipe.parse("conv batch=2")
    with pytest.raises(ValueError, match="expected name=value, got 'batch'"):
        Recipe.parse("linear batch")


def test_a_wrong_kernel_is_found_and_its_recipe_made_smaller(monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    """Wrong for an odd number of features."""
    run = judge.run

    def wrong(case, tensors, backend, *arguments, **options):  # type: ignore[no-untyped-def]
        found = run(case, tensors, backend, *arguments, **options)
        if backend == "native" and found["output0"].shape[-1] % 2:
            found["output0"] = found["output0"] * 1.001
        return found

    for module in (judge, shared):
        monkeypatch.setattr(module, "run", wrong)
    recipe = Recipe.parse("linear tokens=16 out=33 layout.x=sliced bias=False threads=2")
    assert judged(recipe)
    smaller = made_smaller(recipe)
    assert judged(smaller)
    assert len(smaller.settings) <= 1
    assert set(smaller.settings) <= {*DEFAULTS, "out"}
