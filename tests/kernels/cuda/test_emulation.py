"""The emulation of the GPU (csrc/cuda/emulated.h): what is right stays right, and what is wrong shows.

The programs are in emulation.cu, which is compiled here. Kernels run in three orders of their warps; a bug is caught if
in one of them the numbers are wrong, the emulation stops, or a sanitizer does.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "csrc"))
from extensions import EMULATION_FLAGS  # noqa: E402
from toolchain import NotBuilt, find_compiler  # noqa: E402

ORDERS = ("0", "1", "7")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
BOUNDS = {"bf16": 3e-7, "f16": 3e-7, "tf32": 1e-3, "fp32": 3e-7}
"""Of errors relative to the sizes of the terms; those of tf32 are the rounding of the operands."""

Program = Callable[..., "subprocess.CompletedProcess[bytes]"]


def compiled(folder: Path, *flags: str) -> Program:
    try:
        compiler = find_compiler()
    except NotBuilt as error:
        pytest.skip(str(error))
    program, source = folder / "emulation", Path(__file__).with_name("emulation.cu")
    command = [*compiler, *EMULATION_FLAGS, "-O0", *flags, f"-I{ROOT / 'csrc'}", "-x", "c++", str(source)]
    subprocess.run([*command, "-o", str(program)], check=True)

    def run(*words: str, order: str = "0", given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        environment = {**os.environ, "MSFORMER_EMULATE_ORDER": order}
        return subprocess.run([program, *words], input=given, env=environment, capture_output=True, check=False)

    return run


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return compiled(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return compiled(tmp_path_factory.mktemp("sanitized"), *SANITIZERS)


def gemm_error(program: Program, engine: str, transposed: str, bug: str, order: str) -> float:
    done = program("gemm", engine, transposed, bug, order=order)
    assert done.returncode == 0, done.stderr.decode()
    return float(done.stdout)


@pytest.mark.parametrize("transposed", ["none", "x", "w", "xw"])
@pytest.mark.parametrize("engine", BOUNDS)
def test_a_product_is_right_in_every_order(engine: str, transposed: str, program: Program) -> None:
    errors = {gemm_error(program, engine, transposed, "none", order) for order in ORDERS}
    assert len(errors) == 1
    assert errors.pop() < BOUNDS[engine]


def test_tf32_rounds_operands(program: Program) -> None:
    """Which a sum in float32 would not show."""
    assert gemm_error(program, "tf32", "none", "none", "0") > 1e-5


@pytest.mark.parametrize("bug", ["no_barrier", "no_trailing_barrier", "no_wait", "wrong_column"])
@pytest.mark.parametrize("transposed", ["none", "xw"])
@pytest.mark.parametrize("engine", BOUNDS)
def test_a_bug_of_a_product_gives_wrong_numbers(engine: str, transposed: str, bug: str, program: Program) -> None:
    errors = [gemm_error(program, engine, transposed, bug, order) for order in ORDERS]
    assert any(not error < 100 * BOUNDS["tf32"] for error in errors)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("gemm bf16 none misaligned_pad", r"a misaligned target of a copy: block \(0, 0, 0\), thread \d+"),
        ("gemm tf32 none never_waited_for", r"a copy that is never waited for: block \(0, 0, 0\), thread 0"),
        (
            "divergent_barrier",
            r"a barrier of the block that not all threads reach: block \(0, 0, 0\), thread 40, .*emulation.cu:\d+",
        ),
        (
            "barrier_of_part_of_a_warp",
            r"a barrier of the block that not all threads reach: block \(0, 0, 0\), thread 0, .*emulation.cu:\d+",
        ),
        ("missing_lane", r"a barrier of the warp that not all lanes reach: block \(0, 0, 0\), thread 32"),
        ("wrong_mask", r"lanes of a warp that meet with different masks: block \(0, 0, 0\), thread \d+"),
        ("misaligned_read", r"a misaligned read: block \(0, 0, 0\), thread \d+"),
        ("large_stack", "a thread with more on its stack than the emulation has room for"),
    ],
)
def test_a_bug_stops_the_emulation(words: str, message: str, program: Program) -> None:
    for order in ORDERS:
        done = program(*words.split(), order=order)
        assert done.returncode != 0
        assert re.search(message, done.stderr.decode()), done.stderr.decode()


def test_shared_memory_is_nan_before_it_is_written(program: Program) -> None:
    for order in ORDERS:
        values = [float(word) for word in program("read_before_write", order=order).stdout.split()]
        assert len(values) == 64
        assert all(math.isnan(value) for value in values)


def test_a_copy_is_not_there_before_it_is_waited_for(program: Program) -> None:
    assert program("late_copy").stdout.split() == [b"1"] * 64


def test_threads_that_have_ended_are_not_waited_for(program: Program) -> None:
    for order in ORDERS:
        assert program("early_end", order=order).stdout.split() == [b"1"] * 40 + [b"0"] * 24


def test_fibers_of_the_c_library(tmp_path: Path) -> None:
    """Those of processors other than x86-64."""
    other = compiled(tmp_path, "-DMSFORMER_EMULATE_WITH_UCONTEXT")
    for order in ORDERS:
        assert gemm_error(other, "bf16", "xw", "none", order) < BOUNDS["bf16"]
        assert b"thread 40" in other("divergent_barrier", order=order).stderr


class TestWithSanitizers:
    @pytest.mark.parametrize("engine", BOUNDS)
    def test_no_false_alarm(self, engine: str, sanitized: Program) -> None:
        for transposed in ("none", "x", "w", "xw"):
            for order in ORDERS:
                assert gemm_error(sanitized, engine, transposed, "none", order) < BOUNDS[engine]

    @pytest.mark.parametrize("words", ["gemm bf16 none no_row_bound", "gemm tf32 xw no_row_bound"])
    def test_a_read_beyond_a_tensor(self, words: str, program: Program, sanitized: Program) -> None:
        for order in ORDERS:
            assert program(*words.split(), order=order).returncode == 0, "without a sanitizer nothing stops it"
            done = sanitized(*words.split(), order=order)
            assert done.returncode != 0
            assert b"AddressSanitizer: heap-buffer-overflow" in done.stderr
            assert b"READ of size 16" in done.stderr

    def test_a_write_beyond_shared_memory(self, sanitized: Program) -> None:
        done = sanitized("beyond_shared_memory")
        assert done.returncode != 0
        assert b"AddressSanitizer: heap-buffer-overflow" in done.stderr
        assert b"WRITE of size 4" in done.stderr


def floats() -> np.ndarray:
    """Every kind of float32: all signs and exponents, mantissas at and beside the ties of narrower types."""
    rng = np.random.default_rng(0)
    near = [(0, 1 << bit, 3 << bit, 0x7FFFFF - (1 << bit)) for bit in (11, 12, 13, 15, 16)]
    mantissas = np.unique(np.add.outer(near, (-1, 0, 1)))
    mantissas = mantissas[(mantissas >= 0) & (mantissas < 1 << 23)]
    upper = np.arange(512, dtype=np.uint32) << 23
    bits = (upper[:, None] | mantissas.astype(np.uint32)).ravel()
    small = np.uint32(np.arange(0, 1 << 24, 4099))  # subnormal and nearly
    halves = (np.arange(1 << 16, dtype=np.uint16).view(np.float16)).astype(np.float32)
    finite = np.sort(halves[np.isfinite(halves)])
    ties = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    return np.concatenate([
        bits.view(np.float32), small.view(np.float32), (small | np.uint32(1 << 31)).view(np.float32), ties,
        np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf)),
        rng.integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32),
    ])  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_conversions_are_those_of_pytorch(name: str, dtype: torch.dtype, program: Program) -> None:
    x = floats()
    found = np.frombuffer(program(f"to_{name}", given=x.tobytes()).stdout, np.int16)
    narrow = torch.from_numpy(x).to(dtype)
    nan = np.isnan(x)
    np.testing.assert_array_equal(found[~nan], narrow.view(torch.int16).numpy()[~nan])
    assert torch.from_numpy(found.copy()).view(dtype).isnan().numpy()[nan].all()
    patterns = np.arange(1 << 16, dtype=np.uint16)
    wide = np.frombuffer(program(f"from_{name}", given=patterns.tobytes()).stdout, np.float32)
    expected = torch.from_numpy(patterns.view(np.int16)).view(dtype).float().numpy()
    nan = np.isnan(expected)
    np.testing.assert_array_equal(wide.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])
    assert np.isnan(wide[nan]).all()


def test_rounding_to_tf32(program: Program) -> None:
    """To 10 bits behind the leading one, ties away from zero; below 2^-126 to the multiples of 2^-136."""
    x = floats()
    found = np.frombuffer(program("round_to_tf32", given=x.tobytes()).stdout, np.float32)
    finite = np.isfinite(x)
    exact = np.abs(x[finite]).astype(np.float64)
    exponents = np.maximum(np.frexp(exact)[1] - 1, -126)
    step = np.ldexp(1.0, exponents - 10)
    rounded = np.floor(exact / step + 0.5) * step
    with np.errstate(over="ignore"):
        expected = np.copysign(rounded, x[finite]).astype(np.float32)
    np.testing.assert_array_equal(found[finite], expected)
    np.testing.assert_array_equal(found[~finite], x[~finite])


LANES = np.arange(32)
REGISTERS = np.dtype([("a", np.uint32, 4), ("b", np.uint32, 2), ("sum", np.float32, 4)])


def packed(matrix: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Registers [32, n] of 16-bit values at (rows, columns) and at the next ones, along the last axis of [32, n, 2]."""
    values = matrix[rows, columns].astype(np.uint32)
    return values[..., 0] | values[..., 1] << 16


@pytest.mark.parametrize("name", ["bf16", "f16"])
def test_multiply_add_has_the_layout_of_the_manual(name: str, program: Program) -> None:
    """mma.m16n8k16 in the PTX manual: of a, b and c which row and column each value of a lane is."""
    dtype = torch.bfloat16 if name == "bf16" else torch.float16
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    group, of_group, i = LANES[:, None] // 4, LANES[:, None] % 4, np.arange(8)
    a_rows = np.where((i % 4) < 2, group, group + 8).reshape(32, 4, 2)
    a_columns = (of_group * 2 + (i & 1) + np.where(i >= 4, 8, 0)).reshape(32, 4, 2)
    i = np.arange(4)
    b_rows = (of_group * 2 + (i & 1) + np.where(i >= 2, 8, 0)).reshape(32, 2, 2)
    b_columns = np.broadcast_to(group, (32, 4)).reshape(32, 2, 2)
    lanes = np.zeros(32, REGISTERS)
    lanes["a"] = packed(a.view(torch.int16).numpy().view(np.uint16), a_rows, a_columns)
    lanes["b"] = packed(b.view(torch.int16).numpy().view(np.uint16), b_rows, b_columns)
    check_sums(program, f"multiply_add_{name}", lanes, a, b, c)


def test_multiply_add_of_tf32_has_the_layout_of_the_manual(program: Program) -> None:
    """mma.m16n8k8; what operands have beyond tf32 is cut off."""
    a, b, c = torch.randn(16, 8), torch.randn(8, 8), torch.randn(16, 8)
    group, of_group, i = LANES[:, None] // 4, LANES[:, None] % 4, np.arange(4)
    lanes = np.zeros(32, REGISTERS)
    bits = a.numpy().view(np.uint32), b.numpy().view(np.uint32)
    lanes["a"] = bits[0][group + i % 2 * 8, of_group + i // 2 * 4]
    lanes["b"] = bits[1][of_group + np.arange(2) * 4, np.broadcast_to(group, (32, 2))]
    cut = [torch.from_numpy((x & np.uint32(0xFFFFE000)).view(np.float32)) for x in bits]
    check_sums(program, "multiply_add_tf32", lanes, cut[0], cut[1], c)


def check_sums(
    program: Program, command: str, lanes: np.ndarray, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor
) -> None:
    i = np.arange(4)
    rows, columns = LANES[:, None] // 4 + i // 2 * 8, LANES[:, None] % 4 * 2 + i % 2
    lanes["sum"] = c.numpy()[rows, columns]
    found = np.frombuffer(program(command, given=lanes.tobytes()).stdout, REGISTERS)["sum"]
    expected = (c.double() + a.double() @ b.double()).numpy()[rows, columns]
    np.testing.assert_allclose(found, expected, rtol=0, atol=4e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrices_has_the_layout_of_the_manual(transposed: bool, program: Program) -> None:
    """ldmatrix: lane l gets of each matrix row l / 4, columns 2 (l % 4) and the next; of its transpose with .trans."""
    matrices = np.arange(256, dtype=np.uint16).reshape(4, 8, 8) * 251
    command = "load_matrices_transposed" if transposed else "load_matrices"
    found = np.frombuffer(program(command, given=matrices.tobytes()).stdout, REGISTERS)["a"]
    for j, matrix in enumerate(matrices):
        columns = LANES[:, None, None] % 4 * 2 + np.arange(2)
        rows = np.broadcast_to(LANES[:, None, None] // 4, columns.shape)
        np.testing.assert_array_equal(found[:, j : j + 1], packed(matrix.T if transposed else matrix, rows, columns))


@pytest.mark.parametrize(
    ("runtime", "driver", "reason"),
    [
        (13050, 13000, ""),
        (13000, 13050, ""),
        (12080, 13000, ""),
        (13050, 12080, "CUDA 13.5 needs driver 580 or newer, this one supports CUDA 12.8"),
        (12060, 11040, "CUDA 12.6 needs driver 525 or newer, this one supports CUDA 11.4"),
        (14010, 13050, "CUDA 14.1 needs a driver for CUDA 14 or newer, this one supports CUDA 13.5"),
        (13050, 0, "there is no NVIDIA driver"),
    ],
)
def test_why_a_driver_does_not_run_the_kernels(runtime: int, driver: int, reason: str, program: Program) -> None:
    assert program("driver", str(runtime), str(driver)).stdout.decode() == f"{reason}\n"
