"""Segmenting one image: a fresh MS-Former is fitted to it until the label map settles. No training set, no labels.

Karimijafarbigloo et al., "MS-Former", MIDL 2023; the loop follows Kim, Kanezaki, Tanaka, "Unsupervised Learning of
Image Segmentation Based on Differentiable Feature Clustering", IEEE TIP 2020: labels are the argmax of the logits,
counted before each step; when few enough are left, that step is the last, and one more forward gives the map. BatchNorm
stays in training mode throughout, also for that forward.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from os import PathLike

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage
from torch import Tensor

import msformer_kernels
from msformer.data import prepare_image, resize_image, resize_labels
from msformer.fitting import Progress, Rule, fit, label_map
from msformer.losses import LossWeights
from msformer.memory import kept_memory
from msformer.model import MINIMUM_SIZE, MSFormer
from msformer.streams import own_stream
from msformer_kernels.backends import resolve

Labels = NDArray[np.integer]
ImageLike = str | PathLike[str] | NDArray[np.generic] | Tensor | PILImage.Image


@dataclass(frozen=True)
class Segmentation:
    """The result of `segment`."""

    labels: Labels
    """Label map at the fitted size ``[h, w]``: 0 is the label that covers most pixels, 1 the next, and so on."""
    labels_full: Labels
    """The same at the size of the given image (nearest neighbour)."""
    num_labels: int
    """Labels in the map."""
    steps: int
    """Optimiser steps taken."""
    settled: bool
    """Whether the fit stopped because `min_labels` was reached, not because `max_steps` was."""
    losses: list[float]
    """The loss before each step."""
    label_counts: list[int]
    """Labels before each step."""
    seconds: float
    """Wall-clock time of the fit."""
    seed: int
    device: str
    backend: str


def segment(
    image: ImageLike,
    *,
    size: int | tuple[int, int] | None = 257,
    max_steps: int = 50,
    min_labels: int = 3,
    seed: int = 0,
    weights: LossWeights | None = None,
    embed_dim: int = 100,
    num_clusters: int | None = None,
    depth: int = 2,
    num_heads: int = 1,
    learning_rate: float = 0.1,
    momentum: float = 0.9,
    device: str | torch.device = "auto",
    backend: str | None = None,
    progress: Progress | bool | None = None,
) -> Segmentation:
    """Segments one image without labels, by fitting an MS-Former to it.

    The same image, settings, machine, backend and number of threads give the same map, bit for bit. The global random
    state is left as it was. May be called from several threads: on a GPU each fit has a stream of its own.

    Args:
        image: a path; a PIL image; an array ``[H, W]``, ``[H, W, 1]``, ``[H, W, 3]`` or ``[H, W, 4]`` (alpha is
            dropped); or a tensor ``[1 or 3, H, W]``. 8-bit values are divided by 255; 16-bit and floating-point values
            are stretched from their minimum and maximum to 0 and 1.
        size: side the image is resized to (area-weighted when shrinking), or (height, width); None keeps its size.
        max_steps: steps at most.
        min_labels: the fit stops when the map has no more labels than this.
        seed: of the initial weights.
        weights: factors of the losses; `LossWeights()` by default.
        embed_dim, num_clusters, depth, num_heads: of the `MSFormer`.
        learning_rate, momentum: of stochastic gradient descent.
        device: ``"auto"`` (the GPU if there is one), or as in PyTorch.
        backend: of the kernels, see `msformer_kernels.use_backend`.
        progress: called as ``progress(step, labels, loss)`` before each step; True prints a line each.

    Raises:
        ValueError: an image that is not one, too small or not finite; a setting out of range, an unknown backend.
        OSError: a path that cannot be read.
        FloatingPointError: the loss became NaN or infinite.
    """
    _check_settings(max_steps, min_labels, learning_rate, momentum)
    weights = LossWeights() if weights is None else weights
    report = _reporter(progress)
    prepared = prepare_image(image)
    original = prepared.shape[1:]
    target = _target_size(size, (original[0], original[1]))
    resized = resize_image(prepared, target)
    chosen_device = find_device(device)
    started = time.perf_counter()
    with (
        own_stream(chosen_device),
        msformer_kernels.use_backend(backend) if backend is not None else nullcontext(),
        kept_memory(),
    ):
        used = resolve(None, chosen_device.type, torch.float32)
        with seeded(seed, chosen_device):
            model = MSFormer(3, embed_dim, num_clusters, depth, num_heads)
        model.to(chosen_device)
        fitted_image = resized[None].to(chosen_device)
        rule = Rule(weights, learning_rate, momentum, max_steps, min_labels)
        history = fit(model, fitted_image, rule, report)
        found = order_by_area(label_map(model, fitted_image))
    seconds = time.perf_counter() - started
    return Segmentation(
        labels=found,
        labels_full=resize_labels(found, (original[0], original[1])),
        num_labels=int(found.max()) + 1,
        steps=len(history.losses),
        settled=history.label_counts[-1] <= min_labels,
        losses=history.losses,
        label_counts=history.label_counts,
        seconds=seconds,
        seed=seed,
        device=str(chosen_device),
        backend=used,
    )


_random_state = threading.Lock()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The global random numbers of PyTorch start from `seed`, in one thread at a time, and are put back afterwards."""
    with _random_state, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _check_settings(max_steps: int, min_labels: int, learning_rate: float, momentum: float) -> None:
    if max_steps < 1:
        raise ValueError(f"max_steps: expected at least 1, got {max_steps}")
    if min_labels < 1:
        raise ValueError(f"min_labels: expected at least 1, got {min_labels}")
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise ValueError(f"learning_rate: expected a positive number, got {learning_rate}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum: expected a number in [0, 1), got {momentum}")


def _target_size(size: int | tuple[int, int] | None, original: tuple[int, int]) -> tuple[int, int]:
    height, width = original if size is None else (size, size) if isinstance(size, int) else size
    if min(height, width) < MINIMUM_SIZE:
        what = "image" if size is None else "size"
        raise ValueError(f"{what}: {height} x {width} pixels are too small, expected at least {MINIMUM_SIZE} each way")
    return height, width


def find_device(device: str | torch.device) -> torch.device:
    """The device that a setting means: ``"auto"`` is the GPU if there is one.

    Raises ValueError for one that cannot be used.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return chosen


def _reporter(progress: Progress | bool | None) -> Progress:
    if callable(progress):
        return progress
    if progress:
        return lambda step, labels, loss: print(f"step {step}: {labels} labels, loss {loss:.4f}")
    return lambda step, labels, loss: None


def order_by_area(labels: NDArray[np.integer]) -> Labels:
    """Renumbers labels by falling area (ties: the smaller old number first), in the smallest type that holds them."""
    old, inverse, areas = np.unique(labels, return_inverse=True, return_counts=True)
    rank = np.empty(len(old), dtype=np.min_scalar_type(len(old) - 1))
    rank[np.argsort(-areas, kind="stable")] = np.arange(len(old))
    return rank[inverse].reshape(labels.shape)
