"""The launch table, tables from files, and the tuner."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.cases import require

pytest.importorskip("triton")
from msformer_kernels import tune
from msformer_kernels.core.precision import float32_products
from msformer_kernels.triton import table as triton_table
from msformer_kernels.triton.table import TABLE, entry_name, launch_options, limit_of, table_entry

BF16 = torch.empty(0, dtype=torch.bfloat16)


def test_options_depend_on_width_and_dtype() -> None:
    assert limit_of("key_tokens", 32) == limit_of("key_tokens", 64) == 64
    assert limit_of("key_tokens", 65) == limit_of("key_tokens", 1000) == 128
    assert table_entry("token_backward", 100, BF16) == TABLE["token_backward"][128, 2]
    assert table_entry("token_backward", 100, torch.empty(0)) == TABLE["token_backward"][128, 4]


def test_a_smaller_architecture_has_entries_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sm_80", "sm_89"):
        monkeypatch.setattr(triton_table, "architecture", lambda name=name: name)
        assert table_entry("key_tokens", 100, BF16)["BD"] < TABLE["key_tokens"][128, 2]["BD"]


def test_a_file_goes_before_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "table.json"
    own = {"BN": 16, "num_warps": 4, "num_stages": 1}
    table.write_text(json.dumps({"entries": {entry_name("cpu", "self_output", 128, 2): own}}))
    monkeypatch.setenv("MSFORMER_TRITON_TABLE", str(table))
    assert table_entry("self_output", 100, BF16) == own
    assert table_entry("self_output", 64, BF16) == TABLE["self_output"][64, 2]


@pytest.mark.parametrize("content", ["", "[]", '{"entries": 3}', '{"entries": {"a": {"BN": "many"}}}'])
def test_a_file_that_is_no_table(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "table.json"
    table.write_text(content)
    monkeypatch.setenv("MSFORMER_TRITON_TABLE", str(table))
    with pytest.raises(ValueError, match=r"MSFORMER_TRITON_TABLE: .*table\.json is not a table of launch options"):
        table_entry("self_output", 64, BF16)


def test_the_tuner_keeps_the_fastest_of_each_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that likes few tokens and many stages."""

    def measure(run: Callable[[], Any]) -> float:
        options = table_entry("self_output", 64, BF16)
        return options["BN"] - 0.1 * options["num_stages"]

    found = tune.tune_entry("self_output", 64, torch.bfloat16, lambda: None, measure)
    assert found == TABLE["self_output"][64, 2] | {"BN": 16, "num_stages": 4}
    assert table_entry("self_output", 64, BF16) == TABLE["self_output"][64, 2], "nothing stays"


@pytest.fixture
def tf32() -> Iterator[None]:
    with float32_products("high"):
        yield


@pytest.mark.parametrize("kernel", sorted(TABLE))
def test_every_kernel_has_a_workload_that_launches_it(kernel: str, monkeypatch: pytest.MonkeyPatch, tf32: None) -> None:
    require("triton")
    asked: list[str] = []

    def record(name: str, width: int, like: torch.Tensor) -> triton_table.Options:
        asked.append(name)
        return launch_options(name, width, like)

    for operator in ("efficient_attention", "efficient_self_attention", "mix_ffn"):
        monkeypatch.setattr(import_module(f"msformer_kernels.ops.{operator}.triton_calls"), "launch_options", record)
    limit, size = min(TABLE[kernel])
    tune.workload(kernel, limit, torch.bfloat16 if size == 2 else torch.float32, 3, "cpu")()
    assert kernel in asked
