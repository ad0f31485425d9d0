"""The side of this machine: the operators as they are, whose calls of the extension are made by an emulated machine.

PyTorch, the reference and the operators run here; a call takes the memory of its tensors along, and brings it back.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from msformer_kernels import _native

LOWEST_ADDRESS = 1 << 32
"""No size or stride of a test is as large, and no tensor lies lower."""
Storages = dict[int, torch.UntypedStorage]


class Guest:
    """A process that makes the calls; `about` is what it says of itself."""

    def __init__(self, command: Sequence[str], extension: Path) -> None:
        script = str(Path(__file__).with_name("guest.py"))
        self.process = subprocess.Popen(
            [*command, script, str(extension)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.calls = 0
        self.about: dict[str, str] = json.loads(self._read_line())

    def _read_line(self) -> bytes:
        assert self.process.stdout is not None
        return self.process.stdout.readline() or self._fail()

    def _fail(self) -> bytes:
        raise RuntimeError(f"the emulated interpreter ended with {self.process.wait()} after {self.calls} calls")

    def call(self, storages: Storages, name: str, values: Sequence[float]) -> None:
        """Makes the call there. The addresses among the values are those of tensors, whose storages are given."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        unique = {storage.data_ptr(): storage for storage in storages.values()}
        numbers = {address: i for i, address in enumerate(unique)}

        def portable(value: float) -> float | tuple[int, int]:
            if not isinstance(value, int) or value < LOWEST_ADDRESS:
                return value
            start = storages[value].data_ptr()
            return numbers[start], value - start

        sizes = [storage.nbytes() for storage in unique.values()]
        head = {"name": name, "values": [portable(value) for value in values], "blocks": sizes}
        self.process.stdin.write(json.dumps(head).encode() + b"\n")
        for address, size in zip(unique, sizes, strict=True):
            self.process.stdin.write(ctypes.string_at(address, size))
        self.process.stdin.flush()
        for address, size in zip(unique, sizes, strict=True):
            content = self.process.stdout.read(size)
            if len(content) < size:
                self._fail()
            ctypes.memmove(address, content, size)
        self.calls += 1

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def calls_made_by(guest: Guest) -> Iterator[None]:
    """The backend `native` runs there. Whoever asks a tensor for its address hands it to the next call."""
    storages: Storages = {}
    own: Callable[[Tensor], int] = torch.Tensor.data_ptr

    def data_ptr(tensor: Tensor) -> int:
        address = own(tensor)
        storages[address] = tensor.untyped_storage()
        return address

    def call(name: str, values: Sequence[float]) -> None:
        try:
            guest.call(storages, name, values)
        finally:
            storages.clear()

    kernels = [name for name in dir(_native) if name.endswith(("_forward", "_backward"))]
    replaced: dict[str, Any] = {name: partial(call, name) for name in kernels}
    with mock.patch.object(torch.Tensor, "data_ptr", data_ptr), mock.patch.multiple(_native, **replaced):
        yield
