"""What the CUDA kernels move, as their emulation counts it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import msformer_kernels as kernels
from benchmarks.cuda_launches import TRAFFIC, name_and_engine, recorded
from benchmarks.cuda_traffic import main
from tests.kernels.cases import require


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("void msformer::gpu::(anonymous namespace)::a_kernel<msformer::gpu::F16, 64>(msformer::gpu::A)", "F16, 64"),
        ("{anonymous}::a_kernel<msformer::gpu::Tf32, true>", "Tf32, true"),
        ("void msformer::gpu::a_kernel<msformer::gpu::Bf16, (bool)1>(msformer::gpu::A)", "Bf16, 1"),
        ("msformer::gpu::a_kernel<msformer::gpu::Bf16Parts<3, 3> >", "Bf16Parts<3, 3>"),
        ("void a_kernel<gpu::Bf16Parts<(int)3, (int)3>, (bool)0>(A)", "Bf16Parts<3, 3>, 0"),
        ("msformer::gpu::a_kernel", ""),
    ],
)
def test_names_of_kernels(function: str, expected: str) -> None:
    assert name_and_engine(function) == ("a_kernel", expected)


def test_bytes_of_a_kernel() -> None:
    """MixFFN's forward reads its tokens with a halo, and writes as many."""
    require("cuda")
    channels, hidden, size = 16, 32, 16
    x = torch.randn(1, size * size, channels)
    fc1, fc2, taps = torch.randn(hidden, channels), torch.randn(channels, hidden), torch.randn(hidden, 1, 3, 3)
    with recorded(TRAFFIC) as launches:
        kernels.mix_ffn(x, size, size, fc1, None, taps, None, fc2, None, backend="cuda")
    (launch,) = launches
    assert launch.kernel == "mix_ffn_forward_kernel"
    tokens, parameters = x.numel() * 4, (fc1.numel() + fc2.numel() + taps.numel()) * 4
    assert launch.written == tokens
    assert tokens + parameters <= launch.read <= tokens + parameters + 3 * 32
    # four tiles of 8 x 8 in float32, each with those of its halo that are in the image, and all parameters
    assert launch.asked >= tokens * (9 * 9 / 8**2 + 1) + 4 * parameters
    with recorded(TRAFFIC) as launches:
        pass
    assert launches == []


def test_the_table_has_every_kernel_and_their_sum(tmp_path: Path) -> None:
    require("cuda")
    out = tmp_path / "new" / "traffic.md"
    done = CliRunner().invoke(main, ["--side", "9", "--dim", "8", "--dtype", "float32", "--out", str(out)])
    assert done.exit_code == 0, done.output
    lines = [line.split(" | ") for line in out.read_text().splitlines() if line.startswith("| MixFFN, backward")]
    names, numbers = [line[1] for line in lines], [[float(cell.strip(" |")) for cell in line[2:]] for line in lines]
    assert {"mix_ffn_second_backward_kernel", "mix_ffn_first_backward_kernel", "**all**"} <= set(names)
    for *parts, total in zip(*numbers, strict=True):
        assert sum(parts) == pytest.approx(total, abs=0.01 * len(names))
