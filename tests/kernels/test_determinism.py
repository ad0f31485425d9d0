"""The same bits on any number of threads and in every run."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cases import LARGE, MEDIUM, SMALL, Case, cast, run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("case", [*LARGE, SMALL[2], SMALL[20]], ids=str)
def test_same_bits_on_any_number_of_threads(
    case: Case, dtype: torch.dtype, float64_backend: str, threads: None
) -> None:
    tensors = cast(case.make(), dtype)
    torch.set_num_threads(1)
    expected = run(case, tensors, float64_backend)
    for count in (2, 3, 2, 7, 2):
        torch.set_num_threads(count)
        for name, found in run(case, tensors, float64_backend).items():
            assert torch.equal(found, expected[name]), (name, count)


@pytest.mark.parametrize("case", MEDIUM, ids=str)
def test_same_bits_in_every_run(case: Case, backend: str) -> None:
    tensors = cast(case.make(), torch.float32)
    expected, found = run(case, tensors, backend), run(case, tensors, backend)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
