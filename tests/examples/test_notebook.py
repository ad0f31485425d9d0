"""The notebook of the first hour."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.examples.notebook import NOTEBOOK, executed


def test_it_is_kept_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow(10)
def test_it_runs_and_shows_what_it_says(tmp_path: Path) -> None:
    for name in ("nbclient", "nbformat", "ipykernel"):
        pytest.importorskip(name)
    outputs = [output for cell in executed(tmp_path).cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert "norm: has hooks" in text
    assert "replaced: 2" in text
    found = re.search(r"never saw the truth: ([\d.]+)", text)
    assert found
    assert float(found[1]) > 80
