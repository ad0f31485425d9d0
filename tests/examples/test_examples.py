"""Every script of the folder examples, at small sizes."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from tests.examples.runs import EXAMPLES, SMALL, command, scripts


def printed(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], folder: Path, *options: str
) -> str:
    """What an example prints that runs in this process, where torch is imported already."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, *options, *SMALL.get(name, [])])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    found = capfd.readouterr()
    assert "warning" not in (found.out + found.err).lower().replace("futurewarning", "")
    return found.out


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, f"{pattern} not in:\n{text}"
    return float(found[1])


def losses(text: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss ([\d.]+)", text)]


@pytest.mark.parametrize("name", scripts())
def test_the_head_says_how_it_is_run_how_long_it_takes_and_what_it_prints(name: str) -> None:
    head = (EXAMPLES / f"{name}.py").read_text().split('"""')[1]
    assert re.search(rf"^Run: ``(python|torchrun .*) ?examples/{name}\.py", head, re.MULTILINE)
    assert re.search(r"^Takes: \d+ s", head, re.MULTILINE)
    assert re.search(r"^Prints: ", head, re.MULTILINE)


def test_the_page_lists_every_example() -> None:
    page = (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.iterdir():
        if path.suffix in (".py", ".ipynb"):
            name = re.escape(path.name)
            assert re.search(rf"^\| \[{name}\]\({name}\) \| .* \| \d+ s", page, re.MULTILINE)


def test_attention(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = printed("attention", monkeypatch, capfd, tmp_path)
    assert number(r"difference from plain PyTorch: (\S+)", found) < 1e-6
    assert number(r"of the gradients: (\S+)", found) < 1e-8


@pytest.mark.slow(5)
def test_segformer_patched(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    found = printed("segformer_patched", monkeypatch, capfd, tmp_path)
    assert "replaced: 9" in found
    assert number(r"difference of the logits: ([^\s,]+)", found) < 1e-3 * number(r"values up to (\S+)", found)
    assert "undone, the same bits: True" in found


@pytest.mark.slow(7)
def test_an_adapter_is_trained_and_its_layer_left_alone(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    found = printed("segformer_adapter", monkeypatch, capfd, tmp_path)
    assert "replaced: 8" in found
    assert re.search(r"left alone: 1\n +SegformerMix\w+: \S+3\S+mlp: .*lora_A", found, re.DOTALL)
    assert len(losses(found)) == 4
    assert losses(found)[-1] < losses(found)[0] / 2


def test_unet_organs(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = printed("unet_organs", monkeypatch, capfd, tmp_path)
    assert losses(found)[-1] < losses(found)[0] / 2
    assert re.search(r"Dice, %: liver [\d.]+, spleen [\d.]+, kidney [\d.]+", found)
    with PILImage.open(tmp_path / "organs.png") as picture:
        assert picture.size == (3 * 3 * 32, 4 * 3 * 32)


@pytest.mark.slow(8)
def test_distributed() -> None:
    found = subprocess.run(command("distributed"), capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert number(r"2 processes and of one differ by ([^\s,]+)", found.stdout) < 1e-5
    assert losses(found.stdout)[-1] < losses(found.stdout)[0]


def test_export_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With one, `make examples` runs it; tests/kernels/patching/test_aot_inductor.py runs such a package."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = printed("export", monkeypatch, capfd, tmp_path)
    assert "msformer.efficient_self_attention.default 1, msformer.mix_ffn.default 1" in found
    assert number(r"exported program differs by (\S+)", found) < 1e-5
    assert "no C++ compiler here" in found
    assert not list(tmp_path.iterdir())


@pytest.mark.slow(6)
def test_ct_volume(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("nibabel")
    found = printed("ct_volume", monkeypatch, capfd, tmp_path)
    assert number(r"Dice ([\d.]+)", found) > 60
    assert (tmp_path / "ct" / "results" / "chest.mask.nii.gz").exists()
    with PILImage.open(tmp_path / "ct" / "montage.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (3 * 96, 2 * 3 * 96, 3)
    assert (pixels == (0, 255, 120)).all(-1).any(), "the border of the mask"
