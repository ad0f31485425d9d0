"""A patched model compiled ahead of time, and the package run by a process that did not make it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import msformer_kernels as kernels
from tests.kernels.patching.models.mix_ffns import ImageMixFFN

RUN = """
import sys, torch
folder = sys.argv[1]
x, expected = torch.load(folder + "/expected.pt")
try:
    torch._inductor.aoti_load_package(folder + "/model.pt2")
except RuntimeError as error:
    print(error)
import msformer_kernels
with torch.no_grad(), torch.profiler.profile() as profile:
    found = torch._inductor.aoti_load_package(folder + "/model.pt2")(x)
torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
print(sum(event.name == "msformer::mix_ffn" for event in profile.events()))
"""


@pytest.mark.slow(15)
@pytest.mark.timeout(600)
def test_a_package_runs_where_this_package_is_imported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = ImageMixFFN().eval(), torch.randn(2, 8, 5, 7)
    with torch.no_grad():
        torch.save((x, model(x)), tmp_path / "expected.pt")
        kernels.patch(model)
        program = torch.export.export(model, (x,))
        torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    command = [sys.executable, "-c", RUN, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    without, operators = found.stdout.splitlines()
    assert without == "Could not find schema for msformer::mix_ffn."
    assert operators == "1"
