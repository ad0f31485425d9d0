"""Shapes, the grids, and how much work a case is."""

from __future__ import annotations

import pytest

from benchmarks.cases import (
    IMAGE_STEPS,
    OPERATIONS,
    QUICK_CASES,
    Case,
    Shape,
    family,
    full_cases,
    in_precisions,
    make_cases,
    parse_shape,
    quick_rivals,
    why_not,
)


@pytest.mark.parametrize("text", ["1x257x257x100h1", "8x7x5x64h2", "2x3x4x8h4m20"])
def test_shapes_are_read_as_they_are_written(text: str) -> None:
    assert str(parse_shape(text)) == text


def test_heads_and_hidden_may_be_left_out() -> None:
    assert parse_shape("1x9x8x100") == Shape(batch=1, height=9, width=8, dim=100, heads=1, hidden=400)
    assert parse_shape("2x9x8x100").tokens == 144


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("257", "is not a shape; expected BATCHxHEIGHTxWIDTHxDIM"),
        ("1x2x3x4h", "is not a shape"),
        ("0x2x3x4", "batch: expected at least 1, got 0"),
        ("1x2x3x10h3", "heads: 3 does not divide 10 channels"),
        ("1x2x3x10h0", "at least 1"),
    ],
)
def test_other_texts_are_errors(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_shape(text)


def test_the_full_grid_has_everything() -> None:
    cases = full_cases()
    assert len(set(cases)) == len(cases)
    assert {case.operation for case in cases} == set(OPERATIONS)
    for operation in ("attention", "block"):
        chosen = [case for case in cases if case.operation == operation]
        assert {case.shape.height for case in chosen if case.shape.dim == 100} == {65, 129, 257, 513, 1025}
        assert {32, 64, 160, 256, 512} <= {case.shape.dim for case in chosen}
        assert {14, 7} <= {case.shape.height for case in chosen}
        for kinds in ({case.shape.batch for case in chosen}, {case.dtype for case in chosen}):
            assert kinds in ({1, 8}, {"float32", "bfloat16"})
        assert {case.passes for case in chosen} == {"forward", "training"}
    assert all(why_not(case.operation, case.shape) is None for case in cases)
    assert "other" not in {family(case.shape) for case in cases}


def test_the_quick_selection_sees_every_operation_and_compiles_no_model() -> None:
    assert {case.operation for case in QUICK_CASES} == set(OPERATIONS)
    for case in QUICK_CASES:
        assert ("compile" in quick_rivals(case, ("eager", "compile"))) == (case.operation not in ("step", "image"))


def test_combinations_that_do_not_exist_are_left_out() -> None:
    small = Shape(1, 7, 7, 512, 8)
    assert make_cases(["step", "image"], [small], ["float32"], ["training"]) == []
    both = ("forward", "training")
    assert len(make_cases(["block"], [small], ["float32", "bfloat16"], both)) == 4
    image = Shape(1, 33, 34, 8)
    assert make_cases(["image"], [image], ["float32", "bfloat16"], both) == [
        Case("image", image, "float32", "training")
    ]


def test_precisions_are_those_of_float32_and_part_of_the_text() -> None:
    shape = Shape(1, 7, 7, 8)
    found = [
        str(case)
        for dtype in ("float32", "bfloat16")
        for case in in_precisions(Case("block", shape, dtype, "forward"), ("highest", "medium"))
    ]
    text = "block 1x7x7x8h1"
    assert found == [f"{text} float32 highest forward", f"{text} float32 medium forward", f"{text} bfloat16 forward"]


def test_work_is_that_of_the_folded_form() -> None:
    """The table in docs/design.md: 8, 22, 16 and 40 N C^2."""
    shape = Shape(2, 5, 7, 12)
    unit = 70 * 12**2

    def flop(operation: str, passes: str) -> float:
        return Case(operation, shape, "float32", passes).work().flop / unit

    assert flop("attention", "forward") == pytest.approx(8)
    assert flop("attention", "training") == pytest.approx(30)
    assert flop("mix_ffn", "forward") == pytest.approx(16)
    assert flop("mix_ffn_skip", "training") == pytest.approx(56)
    assert flop("block", "training") == pytest.approx(86)
    moved = [Case("attention", shape, dtype, "forward").work().bytes for dtype in ("float32", "bfloat16")]
    assert moved == [4 * (3 * 70 * 12 + 4 * 144), 2 * (3 * 70 * 12 + 4 * 144)]


def test_a_step_is_mostly_its_blocks() -> None:
    shape = Shape(1, 64, 64, 100)
    blocks = 2 * 86 * (64**2 + 32**2) * 100**2
    step = Case("step", shape, "float32", "training").work().flop
    assert blocks < step < 1.2 * blocks
    image = Case("image", shape, "float32", "training").work().flop
    assert IMAGE_STEPS * step < image < (IMAGE_STEPS + 1) * step
