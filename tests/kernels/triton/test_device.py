"""For which family of GPUs kernels are tuned and compiled, without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import msformer_kernels as kernels
from tests.kernels.cases import require

pytest.importorskip("triton")
import triton

from msformer_kernels.triton import device as triton_device
from msformer_kernels.triton.device import MMA_SYNC, compile_options, family, ptxas_release, wgmma_is_safe
from msformer_kernels.triton.launch import alignment
from msformer_kernels.triton.table import TABLE, table_entry

BF16 = torch.empty(0, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("arch", "expected"),
    [(80, "sm_80"), (86, "sm_89"), (87, "sm_80"), (89, "sm_89"), (90, "sm_90"), (100, "sm_100"), (103, "sm_100"),
     (110, "sm_100"), (120, "sm_120"), (121, "sm_120")],
)  # fmt: skip
def test_family_of_an_architecture(arch: int, expected: str) -> None:
    assert family("cuda", arch, (13, 4)) == expected
    assert family("hip", "gfx942", None) == "gfx942"


@pytest.mark.parametrize(
    ("version", "safe"),
    [
        ("ptxas: NVIDIA (R) Ptx optimizing assembler\nCuda compilation tools, release 12.8, V12.8.93\n", False),
        ("Cuda compilation tools, release 12.9, V12.9.86", False),
        ("Cuda compilation tools, release 13.1, V13.1.80", False),
        ("Cuda compilation tools, release 13.3, V13.3.33", True),
        ("Cuda compilation tools, release 13.10, V13.10.1", True),
        ("nonsense", False),
    ],
)
def test_hopper_goes_without_wgmma_where_ptxas_may_compile_it_wrongly(version: str, safe: bool) -> None:
    release = ptxas_release(version)
    assert wgmma_is_safe(release) == safe
    assert family("cuda", 90, release) == ("sm_90" if safe else MMA_SYNC)
    assert family("cuda", 80, release) == "sm_80"
    assert family("cuda", 100, release) == "sm_100"


class Driver:
    """Of a machine with GPUs of these architectures."""

    def __init__(self, *archs: int) -> None:
        self.archs, self.current = archs, 0

    def get_current_device(self) -> int:
        return self.current

    def get_current_target(self) -> Any:
        return SimpleNamespace(backend="cuda", arch=self.archs[self.current])


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Of an A100 and an H100, with a ptxas of CUDA 12.8."""
    found = Driver(80, 90)
    monkeypatch.setattr(triton_device, "INTERPRETED", SimpleNamespace(value=False))
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=found))
    monkeypatch.setattr(triton_device, "ptxas", lambda arch: (12, 8))
    return found


def test_each_device_has_its_own_architecture_and_options(driver: Driver) -> None:
    assert triton_device.architecture() == "sm_80"
    assert "arch" not in compile_options()
    driver.current = 1
    assert triton_device.architecture() == MMA_SYNC
    assert compile_options()["arch"] == "sm80"
    assert table_entry("key_tokens", 100, BF16) != TABLE["key_tokens"][128, 2], "the tiles are those of sm_80, too"


def test_explain_tells_of_a_ptxas_that_may_be_wrong(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    require("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    driver.current = 1
    reason = kernels.explain("cuda", operator="mix_ffn").reasons["triton"]
    assert reason.startswith("usable, products without wgmma, for ptxas 12.8 may compile it wrongly on this GPU")
    driver.current = 0
    assert kernels.explain("cuda", operator="mix_ffn").reasons["triton"] == "usable"


def test_alignment_is_of_strides_that_are_stepped_over() -> None:
    def strided(*strides: int, batch: int = 2) -> torch.Tensor:
        return torch.empty(200, dtype=torch.bfloat16).as_strided((batch, 6, 8), strides)

    assert alignment(strided(48, 8, 1)) == 8
    assert alignment(strided(99, 8, 1)) == 1
    assert alignment(strided(99, 8, 1, batch=1)) == 8
    assert alignment(strided(0, 8, 1)) == 8
    assert alignment(strided(48, 8, 1), torch.empty(2, 3, 6)) == 2
