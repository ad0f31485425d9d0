"""Products of float32 tensors with less than float32's precision, where the user allows it
(`torch.set_float32_matmul_precision`), by the CPU kernels. Variants that have nothing faster keep to float32."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch

from benchmarks.accuracy import Rule
from msformer_kernels.core.precision import cpu_float32_precision, float32_products
from tests.kernels.cases import Case
from tests.kernels.cases.efficient_attention import CASES as ATTENTION
from tests.kernels.cases.efficient_self_attention import CASES as SELF_ATTENTION
from tests.kernels.cases.linear import CASES as LINEAR
from tests.kernels.cases.mix_ffn import CASES as MIX_FFN
from tests.kernels.ops.shared import add_draw_of_precision

CASES = [
    *(pytest.param(case, id=f"attention-{case}") for case in ATTENTION.small[:3]),
    *(pytest.param(case, id=f"self_attention-{case}") for case in (*SELF_ATTENTION.small, *SELF_ATTENTION.medium)),
    *(pytest.param(case, id=f"linear-{case}") for case in LINEAR.small),
    *(pytest.param(case, id=f"mix_ffn-{case}") for case in (*MIX_FFN.small, *MIX_FFN.medium)),
]
DRAWS = 3
autocast = partial(torch.autocast, "cpu", torch.bfloat16)


@pytest.mark.accuracy
@pytest.mark.parametrize("case", CASES)
def test_high_f32(case: Case, float64_backend: str) -> None:
    """Two bfloat16 parts, so 16 bits, as PyTorch documents it: no value is further off than such arithmetic may be."""
    rule = Rule()
    for _ in range(DRAWS):
        add_draw_of_precision(rule, case, float64_backend, "high", nullcontext, 2**-15)
    worst = {name: c.worst for name, c in rule.comparisons.items() if not c.worst <= 1}
    assert not worst


@pytest.mark.accuracy
@pytest.mark.parametrize("case", CASES)
def test_medium_f32(case: Case, float64_backend: str) -> None:
    """One bfloat16 part: no less accurate than eager under autocast."""
    rule = Rule()
    for count in (DRAWS, 4 * DRAWS, 16 * DRAWS):
        while rule.draws < count:
            add_draw_of_precision(rule, case, float64_backend, "medium", autocast, torch.finfo(torch.bfloat16).eps)
        if not rule.faults():
            return
    raise AssertionError("\n".join(rule.faults()))


@pytest.mark.accuracy
@pytest.mark.parametrize("case", [SELF_ATTENTION.small[0], LINEAR.small[0], MIX_FFN.small[0]], ids=str)
def test_float32_activations_under_autocast(case: Case, float64_backend: str) -> None:
    """As of a residual stream: products are of bfloat16, and no less accurate than eager's."""
    rule = Rule()
    for count in (DRAWS, 4 * DRAWS, 16 * DRAWS):
        while rule.draws < count:
            add_draw_of_precision(
                rule, case, float64_backend, "highest", autocast, torch.finfo(torch.bfloat16).eps, autocast
            )
        if not rule.faults():
            return
    raise AssertionError("\n".join(rule.faults()))


def test_the_precision_is_that_of_the_call() -> None:
    before = torch.get_float32_matmul_precision()
    for name in ("highest", "high", "medium"):
        with float32_products(name):
            assert cpu_float32_precision() == name
    assert cpu_float32_precision() == before
