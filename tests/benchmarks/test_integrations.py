"""`python -m benchmarks.integrations`: a row, what it goes on with, and what becomes of failures."""

from __future__ import annotations

import json
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

from benchmarks import integration_row, integrations
from benchmarks.integration_models import MODELS, ForeignModel
from benchmarks.integration_row import (
    BOTH,
    COMPILE,
    FAILED,
    FORWARD,
    MEASURED,
    ORIGINAL,
    PATCHED,
    TRAINING,
    IntegrationRow,
)
from tests.kernels.patching.models.mix_ffns import ImageMixFFN

FORM, OTHER = "form/missformer-block", "form/dae-former-block"


def small() -> nn.Module:
    other = ImageMixFFN()
    other.fc2 = nn.Conv2d(16, 4, 1, bias=False)
    return nn.Sequential(ImageMixFFN(), other)


TINY = ForeignModel("tiny", (), small, lambda: (torch.randn(1, 8, 40, 30),))


def test_a_row_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: nn.Module) -> nn.Module:
        def forward(*given: Tensor) -> Tensor:
            raise RuntimeError("the compiler\nfailed")

        model.forward = forward  # type: ignore[method-assign]
        return model

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(integration_row.msformer_kernels, "patch", _patch_anyway)
    row = integration_row.measure(TINY, 1, 60)
    assert (row.status, row.samples, row.inputs) == (MEASURED, 1, ["(1, 8, 40, 30)"])
    assert row.replaced == {"mix_ffn": 1}
    assert row.left_alone == {"ImageMixFFN: its output features differ from its input features": 1}
    assert row.error is not None
    assert row.error < 1e-12
    assert row.compile_failures == dict.fromkeys((COMPILE, BOTH), "RuntimeError: the compiler")
    assert 0 < row.differences[PATCHED] < 1e-5
    assert {passes: set(times) for passes, times in row.seconds.items()} == {
        FORWARD: {ORIGINAL, PATCHED},
        TRAINING: {ORIGINAL, PATCHED},
    }
    assert set(row.memory) == {ORIGINAL, PATCHED}
    assert IntegrationRow.from_json(json.loads(json.dumps(row.__dict__))) == row


_patch = integration_row.msformer_kernels.patch


def _patch_anyway(model: nn.Module, **_: Any) -> Any:
    return _patch(model, min_gain=0)


def test_a_patch_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def patch(model: Any, **_: Any) -> Any:
        with torch.no_grad():
            model[1].fc2.weight.mul_(1.1)
        return _patch(model, min_gain=0)

    monkeypatch.setattr(integration_row.msformer_kernels, "patch", patch)
    row = integration_row.measure(TINY, 1, 0)
    assert (row.status, row.reason) == (FAILED, "the output of the patched model is off by 0.1")
    assert row.seconds == {}


def test_missing_packages_are_named() -> None:
    model = ForeignModel("x", ("torch>=1", "no-such-package>=3"), small, tuple)
    assert integration_row.measure(model, 1, 0) == IntegrationRow("x", "skipped", "no-such-package>=3 is not installed")
    assert ForeignModel("x", ("torch<1",), small, tuple).missing() == (
        f"torch<1 is needed, {torch.__version__} is installed"
    )


def test_a_compilation_ends_after_its_time() -> None:
    with pytest.raises(TimeoutError, match=r"not compiled within 0.01 s"), integration_row.time_limit(0.01):
        time.sleep(5)


def full_row(name: str) -> IntegrationRow:
    times = {ORIGINAL: 3e-3, COMPILE: 2e-3, PATCHED: 1e-3, BOTH: 5e-4}
    row = IntegrationRow(name, MEASURED, inputs=["(1, 3)"], samples=1, replaced={"mix_ffn": 8}, error=2e-15)
    row.left_alone, row.other_programs = {"Mlp: it is gated": 4}, 1.5
    row.seconds, row.memory = {FORWARD: times, TRAINING: times}, {ORIGINAL: 2**25, COMPILE: None, PATCHED: 2**24}
    return row


def run(*arguments: object) -> Result:
    return CliRunner().invoke(integrations.main, [str(argument) for argument in arguments])


def test_a_run_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: Counter[str] = Counter()

    def measured(name: str, *_: object) -> IntegrationRow:
        made[name] += 1
        if name == FORM and made[name] == 1:
            raise KeyboardInterrupt
        return full_row(name)

    monkeypatch.setattr(integrations, "measured", measured)
    out = tmp_path / "folder" / "found.json"
    options = ["--models", f"{OTHER},{FORM}", "--samples", 1, "--threads", torch.get_num_threads(), "--out", out]
    first = run(*options)
    assert first.exit_code == integrations.INTERRUPTED
    assert [row["model"] for row in json.loads(out.read_text())["rows"]] == [OTHER]
    second = run(*options)
    assert second.exit_code == 0, second.output
    assert made == {OTHER: 1, FORM: 2}
    lines = out.with_suffix(".md").read_text().splitlines()
    times = "1.00 ms | 3.00 x | 2.00 x | 4.00 x"
    assert f"| {FORM} | (1, 3) | 8 mix_ffn | 4 | 2e-15 | {times} | {times} | 32 MiB, unknown, 16 MiB |" in lines
    assert f"- {FORM}, left alone: 4 Mlp: it is gated" in lines
    assert f"- {FORM}: other programs kept 1.5 cores busy: do not rely on its times" in lines
    other = run("--models", FORM, "--samples", 2, "--out", out)
    assert other.exit_code == 1
    assert "measured with samples 1, now 2; give another --out" in other.output


def test_unknown_models_and_other_files_are_errors(tmp_path: Path) -> None:
    assert "--models: no resnet; there are transformers-5/segformer-b0, " in run("--models", "resnet").output
    (tmp_path / "other.json").write_text("[]")
    found = run("--models", FORM, "--out", tmp_path / "other.json")
    assert found.exit_code == 1
    assert "expected results of this program" in found.output


def test_models_are_chosen_by_patterns() -> None:
    attentions = [name for name in MODELS if name.startswith("denoising-diffusion/attention-")]
    assert integrations.chosen(f"{FORM}, denoising-diffusion/attention-*,{attentions[0]}") == [FORM, *attentions]
    assert "denoising-diffusion/attention-64-32-4" in attentions
    assert integrations.chosen(None) == list(MODELS)
    with pytest.raises(click.UsageError, match=r"no timn/\*; there are transformers-5/segformer-b0, "):
        integrations.chosen(f"{FORM},timn/*")


@pytest.mark.parametrize(("code", "reason"), [(1, "ValueError: bad"), (-9, "the process was ended by signal 9")])
def test_a_process_that_fails_is_a_row(code: int, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[str] = []

    def ended(command: list[str], env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
        seen.append(env["PYTHONPATH"])
        return subprocess.CompletedProcess(command, code, stderr="Traceback\nValueError: bad\n")

    monkeypatch.setattr(integrations.subprocess, "run", ended)
    for name in ("transformers-4/glpn", "transformers-5/glpn"):
        row = integrations.measured(name, 1, 1, 0, tmp_path)
        assert (row.status, row.reason) == (FAILED, reason)
    assert seen[0].startswith(str(tmp_path))
    assert not seen[1].startswith(str(tmp_path))


def test_the_forms_run_on_their_inputs() -> None:
    forms = [model for model in MODELS.values() if not model.packages]
    with torch.no_grad():
        outputs = [model.make().eval()(*model.inputs()) for model in forms]
    assert [y.shape for y in outputs] == [model.inputs()[0].shape for model in forms]
    assert all(model.inputs()[0].requires_grad for model in forms)
