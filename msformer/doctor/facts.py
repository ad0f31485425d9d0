"""What is installed, and what the kernels use on this machine."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from typing import Any

import torch
from packaging.requirements import Requirement

import msformer
import msformer_kernels
from msformer.machine import cores, processor_name
from msformer_kernels.core.operator import OPERATORS

FOR_DEVELOPERS = frozenset(("all", "bench", "dev", "docs", "examples", "integrations", "libraries", "readers", "test"))
"""Extras that a user does not need."""
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET", "RAY_ADDRESS")
"""Of the environment, beside those that start with MSFORMER_."""


@dataclass(frozen=True)
class Extra:
    """An optional part of the installation."""

    name: str
    missing: list[str]
    """What its packages lack here: a package, with the version that is too old if there is one."""

    @property
    def command(self) -> str:
        """That installs it."""
        return f"pip install 'msformer[{self.name}]'"


@dataclass(frozen=True)
class Backend:
    """What a call of an operator gets."""

    name: str | None
    """None: the call is refused."""
    why: str


@dataclass(frozen=True)
class Facts:
    """All that `doctor` knows before the self-test."""

    versions: dict[str, str]
    extras: list[Extra]
    machine: dict[str, str]
    cores: int
    threads: int
    variants: list[str]
    """Of the compiled CPU kernels, that run here, the one in use first."""
    no_tiles: str
    """Why the kernels for AMX are not used; empty if they are, or there are none."""
    thread_library: str
    """The OpenMP runtime that the CPU kernels take their threads from; empty if there is none, or they are not here."""
    gpus: list[str]
    no_gpu: str
    """Why PyTorch uses none; empty if it does."""
    backends: dict[str, dict[str, Backend]]
    """By device and operator."""
    unused: dict[str, dict[str, str]]
    """By device: the backends that cannot be used, and why."""
    environment: dict[str, str]

    def record(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


def gather() -> Facts:
    """Looks at this process and its machine."""
    gpus = [_gpu(index) for index in range(torch.cuda.device_count())]
    variants, no_tiles, thread_library = _kernels()
    devices = ("cpu", "cuda") if gpus else ("cpu",)
    return Facts(
        versions={"msformer": msformer.__version__, "torch": torch.__version__, "python": platform.python_version()},
        extras=extras(),
        machine={"system": platform.platform(), "processor": processor_name()},
        cores=cores(),
        threads=torch.get_num_threads(),
        variants=variants,
        no_tiles=no_tiles,
        thread_library=thread_library,
        gpus=gpus,
        no_gpu="" if gpus else _why_no_gpu(),
        backends={device: {name: _backend(device, name) for name in OPERATORS} for device in devices},
        unused={device: _unused(device) for device in devices},
        environment={
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith("MSFORMER_") or name in VARIABLES
        },
    )


def extras() -> list[Extra]:
    """The optional parts for users; none where the package runs from a source folder without being installed."""
    try:
        metadata = distribution("msformer").metadata
    except PackageNotFoundError:
        return []
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist") or []]
    names = [name for name in metadata.get_all("Provides-Extra") or [] if name not in FOR_DEVELOPERS]
    return [Extra(name, _missing(requirements, name)) for name in names]


def _missing(requirements: list[Requirement], extra: str) -> list[str]:
    found = []
    for each in requirements:
        if each.marker is None or each.marker.evaluate({"extra": ""}) or not each.marker.evaluate({"extra": extra}):
            continue
        try:
            here = version(each.name)
        except PackageNotFoundError:
            if each.name != "msformer":
                found.append(each.name)
            continue
        if not each.specifier.contains(here, prereleases=True):
            found.append(f"{each.name}{each.specifier} (here is {here})")
    return found


def _kernels() -> tuple[list[str], str, str]:
    """Of the compiled CPU kernels: variants, why there are no tiles, where their threads come from."""
    try:
        from msformer_kernels import _native
    except ImportError:
        return [], "", ""
    used = _native.isa()
    variants = [used, *(name for name in _native.available_isas() if name != used)]
    return variants, _native.why_tiles_are_refused() or "", _native.thread_library() or ""


def _gpu(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    free, total = (number / 2**30 for number in torch.cuda.mem_get_info(index))
    name = torch.cuda.get_device_name(index)
    return f"cuda:{index}: {name}, compute capability {major}.{minor}, {free:.1f} of {total:.1f} GB free"


def _why_no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "this build of PyTorch is for CPUs alone"
    return "PyTorch sees no GPU, or no driver for it"


def _backend(device: str, operator: str) -> Backend:
    found = msformer_kernels.explain(device, operator=operator)
    return Backend(found.chosen, found.rule)


def _unused(device: str) -> dict[str, str]:
    reasons = msformer_kernels.explain(device).reasons
    prefix = "not usable: "
    return {name: text.removeprefix(prefix) for name, text in reasons.items() if text.startswith(prefix)}
