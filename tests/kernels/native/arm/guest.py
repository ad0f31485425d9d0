"""The side of the emulated machine: makes calls of the extension that come by its standard input, and sends back what
the memory holds afterwards. Nothing but the standard library is needed.

    qemu-aarch64 python guest.py _native.so
"""

from __future__ import annotations

import ctypes
import json
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

ALIGNMENT = 64


def load(path: str) -> Any:
    spec = spec_from_file_location("_native", path, loader=ExtensionFileLoader("_native", path))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Block:
    """Memory of its own that lies as PyTorch's would."""

    def __init__(self, content: bytes) -> None:
        self.size = len(content)
        self.memory = ctypes.create_string_buffer(self.size + ALIGNMENT)
        self.address = (ctypes.addressof(self.memory) + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        ctypes.memmove(self.address, content, self.size)

    def content(self) -> bytes:
        return ctypes.string_at(self.address, self.size)


def main() -> None:
    native = load(sys.argv[1])
    inputs, outputs = sys.stdin.buffer, sys.stdout.buffer
    about = {"isa": native.isa(), "python": sys.version.split()[0], "threads": native.thread_library()}
    outputs.write(json.dumps(about).encode() + b"\n")
    outputs.flush()
    while line := inputs.readline():
        call = json.loads(line)
        blocks = [Block(inputs.read(size)) for size in call["blocks"]]
        values = [v if not isinstance(v, list) else blocks[v[0]].address + v[1] for v in call["values"]]
        getattr(native, call["name"])(tuple(values))
        for block in blocks:
            outputs.write(block.content())
        outputs.flush()


if __name__ == "__main__":
    main()
