"""The process that runs items.

    python -m benchmarks.gpu.worker DESCRIPTOR         a request a line on standard input, a reply a line on DESCRIPTOR
    python -m benchmarks.gpu.worker --once REQUEST REPLY      a request from a file, the reply to a file

A request is ``{"call": ".module:function", "arguments": {...}}``. A reply has ``rows``, or ``skipped`` (why), or
``error`` and ``traceback``, and then whether the device is ``broken``: after an illegal memory access every later call
fails, so the process ends.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

from .items import Skip


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The reply to a request."""
    try:
        _choose_device(request["arguments"].get("device", ""))
        module, _, function = request["call"].partition(":")
        found = getattr(import_module(module, __package__), function)(**request["arguments"])
        return {"rows": found if isinstance(found, list) else [found]}
    except Skip as reason:
        return {"skipped": str(reason)}
    except Exception as error:  # compilers and drivers raise whatever they like
        text = f"{type(error).__name__}: {error}".strip()
        return {"error": text[:2000], "traceback": traceback.format_exc()[-8000:], "broken": _device_is_broken()}


def _choose_device(device: str) -> None:
    """Makes ``cuda:1`` and the like the current device."""
    if device.startswith("cuda:"):
        import torch

        torch.cuda.set_device(device)


def _device_is_broken() -> bool:
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def serve(descriptor: int) -> None:
    os.set_inheritable(descriptor, False)  # a compiler that outlives this process must not keep the pipe open
    with os.fdopen(descriptor, "w") as replies:

        def send(reply: dict[str, Any]) -> None:
            replies.write(json.dumps(reply) + "\n")
            replies.flush()

        import torch  # noqa: F401  takes seconds, which are not those of the first item

        send({"ready": True})
        for line in sys.stdin:
            reply = answer(json.loads(line))
            send(reply)
            if reply.get("broken"):
                return


def main() -> None:
    faulthandler.enable()
    if sys.argv[1] == "--once":
        reply = answer(json.loads(Path(sys.argv[2]).read_text()))
        Path(sys.argv[3]).write_text(json.dumps(reply))
        sys.exit(1 if "error" in reply else 0)
    serve(int(sys.argv[1]))


if __name__ == "__main__":
    main()
