"""The machine: what it is, what it can do at most, and the memory of this process, all measured."""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import msformer_kernels

from .rivals import is_ours, type_name, variant_of


@dataclass(frozen=True)
class Ceilings:
    """What no program on these threads can exceed."""

    flop_per_second: float
    flop_source: str
    bytes_per_second: float
    bytes_source: str
    pair_flop_per_second: float | None = None
    """Of bfloat16 products by AVX-512 BF16; None where there is none."""
    tile_flop_per_second: float | None = None
    """Of bfloat16 products on AMX tiles; None where this process has none."""

    def or_better(self, other: Ceilings) -> Ceilings:
        """The higher rates of two measurements: what was measured while something else ran is no ceiling."""
        rates: dict[str, Any] = {
            item.name: max(filter(None, (getattr(self, item.name), getattr(other, item.name))), default=None)
            for item in fields(self)
            if item.name.endswith("per_second")
        }
        return replace(self, **rates)

    def bfloat16_rates(self) -> list[tuple[float | None, str]]:
        """With what they are."""
        return [
            (self.pair_flop_per_second, "bfloat16 products by AVX-512 BF16"),
            (self.tile_flop_per_second, "bfloat16 products on AMX tiles"),
        ]

    def flop_rate(self, kind: str, rival: str) -> float:
        """Flop a second of the unit that does a rival's products of a type such as "float32 high".

        In bfloat16, which "medium" rounds to, that is the best that a variant of the kernels has; PyTorch has all.
        "high" is three products on the tiles, and only our kernels do that. "highest" counts as multiply-adds, also on
        the tiles, which do six products for each in less time.
        """
        variant = (variant_of(rival) or instruction_set()) if is_ours(rival) else "amx"
        tiles = self.tile_flop_per_second if variant == "amx" else None
        if kind == type_name("float32", "high"):
            return tiles / 3 if tiles and is_ours(rival) else self.flop_per_second
        if kind not in ("bfloat16", type_name("float32", "medium")):
            return self.flop_per_second
        pairs = self.pair_flop_per_second if variant in ("amx", "avx512_bf16") else None
        return tiles or pairs or self.flop_per_second


@dataclass(frozen=True)
class Machine:
    """Where and with what was measured."""

    processor: str
    cores: int
    memory: int
    """Bytes."""
    system: str
    python: str
    torch: str
    msformer: str
    threads: int
    instruction_set: str
    backends: tuple[str, ...]
    date: str


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """The GPU and what drives it; needs torch alone."""
    machine: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda or torch.version.hip}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {"gpu": properties.name, "memory GiB": properties.total_memory >> 30}
        machine |= {"capability": f"{properties.major}.{properties.minor}"}
        machine |= {"processors": properties.multi_processor_count}
    return machine


def describe() -> Machine:
    import psutil

    import msformer

    return Machine(
        processor=_processor(),
        cores=psutil.cpu_count() or 0,
        memory=psutil.virtual_memory().total,
        # the rest of a release may be the name of whoever built it, and results are made to be published
        system=f"{platform.system()} {re.split('[^0-9.]', platform.release())[0]}, {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        msformer=msformer.__version__,
        threads=torch.get_num_threads(),
        instruction_set=instruction_set(),
        backends=msformer_kernels.available_backends(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    parts = (line.partition(":") for line in reversed(lines))
    fields = {name.strip(): value.strip() for name, _, value in parts}
    name = fields.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def instruction_set() -> str:
    """The variant of the CPU kernels that this process uses."""
    if "native" not in msformer_kernels.available_backends():
        return f"{torch.backends.cpu.get_cpu_capability()} (of PyTorch)"
    from msformer_kernels import _native

    return _native.isa()


def usable_variants() -> tuple[str, ...]:
    """Of the CPU kernels, what this machine can use, the best first."""
    if "native" not in msformer_kernels.available_backends():
        return ()
    from msformer_kernels import _native

    return tuple(_native.available_isas())


def last_level_cache() -> int:
    """Bytes of the largest cache of the first core; 64 MiB where that is not known."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[text[-1]])
    return max(sizes, default=64 * 2**20)


def measure_ceilings(attempts: int = 3, size: int = 256 * 2**20, steps: int = 30_000_000) -> Ceilings:
    """Products in registers, and a copy of `size` bytes; the best of several attempts on all threads."""
    flop, source = _rate("multiply_adds", attempts, steps), "float32 multiply-adds in registers"
    if flop is None:
        matrix = torch.ones(2048, 2048)
        flop = 2 * 2048**3 / min(_seconds(lambda: matrix @ matrix) for _ in range(attempts + 2))
        source = "float32 product of 2048 x 2048 matrices (no C++ compiler found)"
    origin = torch.ones(size // 4)
    copy = torch.empty_like(origin)
    copied = 2 * size / min(_seconds(lambda: copy.copy_(origin)) for _ in range(attempts + 2))
    return Ceilings(
        flop,
        source,
        copied,
        f"copy of {size / 2**20:.0f} MiB, reads and writes counted",
        _rate("pair_products", attempts, steps),
        # asking for the list of variants has asked for the permission to use tiles
        _rate("tile_products", attempts, steps // 8) if "amx" in usable_variants() else None,
    )


_SOURCES = {
    "multiply_adds": "multiply_adds.cpp",
    "pair_products": "bfloat16_products.cpp",
    "tile_products": "bfloat16_products.cpp",
}


def _rate(name: str, attempts: int, steps: int) -> float | None:
    """Flop a second that a function of a C++ file beside this one reaches; None without compiler or instructions."""
    library = _compiled(_SOURCES[name])
    if library is None:
        return None
    function = getattr(library, name)
    function.restype = ctypes.c_double
    function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_void_p]

    def attempt() -> float:
        started = time.perf_counter()
        flop = function(torch.get_num_threads(), steps, ctypes.byref(ctypes.c_float()))
        return float(flop) / (time.perf_counter() - started)

    return max(attempt() for _ in range(attempts)) or None


@lru_cache
def _compiled(source: str) -> ctypes.CDLL | None:
    """A C++ file beside this one, compiled for this processor; None without a compiler."""
    compiler = next((found for name in ("g++", "c++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "ceilings.so"
        command = [compiler, "-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp", "-shared", "-fPIC"]
        path = str(Path(__file__).with_name(source))
        # on processors other than x86-64 there is no width to prefer
        for flags in (command, [flag for flag in command if "vector-width" not in flag]):
            done = subprocess.run([*flags, path, "-o", str(library)], capture_output=True, check=False)
            if done.returncode == 0:
                return ctypes.CDLL(str(library))
    return None


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


class OtherPrograms:
    """How busy the machine is with anything but this process and those it started, since this was made."""

    SHORTEST = 0.5
    """Seconds; the system counts in hundredths, so less than this says little."""

    def __init__(self) -> None:
        self._started, self._busy, self._own = time.perf_counter(), _busy_seconds(), _own_seconds()

    def seconds(self) -> float:
        """Since this was made."""
        return time.perf_counter() - self._started

    def cores(self) -> float | None:
        """Cores that were busy with other programs, on average; None if it was too short to tell."""
        seconds = self.seconds()
        if seconds < self.SHORTEST:
            return None
        busy, own = _busy_seconds() - self._busy, _own_seconds() - self._own
        return max(0.0, (busy - own) / seconds)


def _busy_seconds() -> float:
    """Of all cores together, since the machine was started."""
    import psutil

    times = psutil.cpu_times()
    return float(sum(times) - times.idle - sum(getattr(times, name, 0.0) for name in ("iowait", "guest", "guest_nice")))


def _own_seconds() -> float:
    """Of all cores together, since this process and those that it started began."""
    import psutil

    found = time.process_time()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            found += times.user + times.system
    return found


def cache_flusher() -> Callable[[], object]:
    """A function that leaves nothing of what was used before in any cache."""
    buffer = torch.zeros(2 * last_level_cache() // 4)
    return lambda: buffer.add_(1.0)


_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def _status(field: str) -> int | None:
    """A size in /proc/self/status, bytes."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def peak_memory(call: Callable[[], object]) -> int | None:
    """Bytes of resident memory that a call adds at its peak to what there was before; None where that is not known."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that is kept for later would hide what the call needs
    before = _status("VmRSS")
    try:
        _RESET.write_text("5")  # the peak is counted from here
    except OSError:
        return None
    call()
    peak = _status("VmHWM")
    return None if before is None or peak is None else max(0, peak - before)


@contextmanager
def limited_memory() -> Iterator[None]:
    """Within the block, an allocation beyond the memory that is free now raises an error of the one who asked."""
    try:
        import resource
    except ImportError:
        yield
        return
    import psutil

    used = _status("VmSize")
    before = resource.getrlimit(resource.RLIMIT_AS)
    if used is None:
        yield
        return
    limit = used + psutil.virtual_memory().available
    resource.setrlimit(resource.RLIMIT_AS, (limit if before[1] < 0 else min(limit, before[1]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
