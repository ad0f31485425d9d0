"""The instructions of AMX do what their emulation does, bit for bit: on hardware, or, where a processor has none of it,
executed one by one by a signal handler (tiles/trap.cpp)."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("msformer_kernels._native", reason="the extension was not built")

ROOT = Path(__file__).resolve().parents[3]
FOLDER = Path(__file__).parent / "tiles"
sys.path.insert(0, str(ROOT / "csrc"))
from extensions import LIBRARIES, ONCE_OF_BASE, supported_variants  # noqa: E402
from toolchain import BuildFailed, find_compiler  # noqa: E402
from variants import AMX, EMULATED_TILES, FLAGS  # noqa: E402

UNITS = {"checked_amx": AMX, "checked_emulation": EMULATED_TILES}


def compiled(folder: Path) -> Path:
    """The program, with the little optimisation of the emulation."""
    try:
        compiler = find_compiler()
    except BuildFailed as error:
        pytest.skip(str(error))
    if AMX.name not in [variant.name for variant in supported_variants(compiler, folder)]:
        pytest.skip("the compiler does not know AMX")
    base = [*compiler, *FLAGS]
    commands = {}
    for name, variant in UNITS.items():
        unit, header = variant.tile_unit or ("", "")
        definitions = {"VARIANT": name, "VECTOR_BYTES": 64, "BFLOAT16_ENGINE": "Values<float>"}
        definitions |= {"TILE_UNIT": unit, "TILE_HEADER": header}
        flags = [f"-DMSFORMER_{key}={value}" for key, value in definitions.items()]
        # the vector code of both is that of any processor with AVX2; the instructions of AMX need no flag
        commands[f"{name}.o"] = [*base, *EMULATED_TILES.flags, *flags, "-c", str(FOLDER / "products.cpp")]
    for source in (*ONCE_OF_BASE, FOLDER / "trap.cpp"):
        commands[f"{source.stem}.o"] = [*base, *EMULATED_TILES.flags, "-c", str(source)]
    for name, command in commands.items():
        subprocess.run([*command, "-o", str(folder / name)], check=True)
    program = folder / "program"
    objects = [str(folder / name) for name in commands]
    subprocess.run([*base, str(FOLDER / "main.cpp"), *objects, *LIBRARIES, "-o", str(program)], check=True)
    return program


@pytest.mark.slow(8)
@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64") or sys.platform != "linux", reason="AMX on Linux only"
)
def test_amx_and_its_emulation_give_the_same_bits(tmp_path: Path) -> None:
    done = subprocess.run([str(compiled(tmp_path))], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "18 products, 0 with other bits" in done.stdout
    assert "nothing was executed" not in done.stdout
