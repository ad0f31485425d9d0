"""The scripts of the folder examples."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


@pytest.mark.slow(7)
def test_an_adapter_is_trained_and_its_layer_left_alone() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    command = [sys.executable, str(EXAMPLES / "segformer_adapter.py")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "replaced: 8" in found.stdout
    assert re.search(r"left alone: 1\n +SegformerMix\w+: \S+3\S+mlp: .*lora_A", found.stdout, re.DOTALL)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", found.stdout)]
    assert len(losses) == 4
    assert losses[-1] < losses[0] / 2
