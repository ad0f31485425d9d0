"""Items that fit MS-Former to images of 257 x 257, as `msformer.segment` does it: one, and several at a time.

They run with MSFORMER_BACKEND in the environment, which holds for all threads.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .cases import set_tf32
from .items import Skip

STEPS, SIDE, IMAGES, AT_ONCE = 50, 257, 16, 4


def _fitted(state: dict[str, Tensor], image: Tensor) -> tuple[float, int, bytes]:
    """Seconds, steps and the label map."""
    from msformer.fitting import Rule, fit, label_map
    from msformer.model import MSFormer
    from msformer.presets import LossWeights
    from msformer.streams import own_stream

    rule = Rule(LossWeights(), 0.1, 0.9, max_steps=STEPS, min_labels=1)
    started = time.perf_counter()
    with own_stream(image.device):
        model = MSFormer()
        model.load_state_dict(state)
        steps = len(fit(model.to(image.device), image, rule, lambda *_: None).losses)
        labels = label_map(model, image).tobytes()
    return time.perf_counter() - started, steps, labels


def _weights_and_image(count: int, device: str) -> tuple[list[dict[str, Tensor]], Tensor]:
    if find_spec("numpy") is None:
        raise Skip("numpy is not installed, which fitting needs: pip install numpy")
    from msformer.model import MSFormer

    torch.manual_seed(0)
    image = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return [MSFormer().state_dict() for _ in range(count)], image.to(device)


def one(dtype: str, backend: str, device: str) -> dict[str, Any]:
    """The second of two fits."""
    (weights,), image = _weights_and_image(1, device)
    set_tf32(dtype)
    for _ in range(2):
        seconds, steps, _ = _fitted(weights, image)
    return {"backend": backend, "dtype": dtype, "images": 1, "at once": 1, "steps": steps, "seconds an image": seconds}


def several(backend: str, device: str) -> list[dict[str, Any]]:
    """One after the other, and four at a time: the label maps must be the same."""
    weights, image = _weights_and_image(IMAGES, device)
    set_tf32("tf32")
    rows: list[dict[str, Any]] = []
    maps = []
    for at_once in (1, AT_ONCE):
        with ThreadPoolExecutor(at_once) as pool:
            started = time.perf_counter()
            found = list(pool.map(lambda state: _fitted(state, image), weights))
            seconds = (time.perf_counter() - started) / IMAGES
        maps.append([labels for _, _, labels in found])
        row = {"backend": backend, "dtype": "tf32", "images": IMAGES, "at once": at_once, "steps": found[0][1]}
        rows.append(row | {"seconds an image": seconds, "ok": maps[0] == maps[-1]})
    return rows
