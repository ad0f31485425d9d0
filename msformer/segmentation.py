"""Segmenting one image: a fresh MS-Former is fitted to it until the label map settles. No training set, no labels.

Karimijafarbigloo et al., "MS-Former", MIDL 2023; the loop follows Kim, Kanezaki, Tanaka, "Unsupervised Learning of
Image Segmentation Based on Differentiable Feature Clustering", IEEE TIP 2020: labels are the argmax of the logits,
counted before each step; when few enough are left, that step is the last, and one more forward gives the map. BatchNorm
stays in training mode throughout, also for that forward.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from os import PathLike
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image as PILImage
from torch import Tensor

import msformer_kernels
from msformer.fitting import Progress, Rule, fit, label_map
from msformer.io.prepare import prepare_image, resize_image, resize_labels, standardise_channels
from msformer.io.read import Reading
from msformer.memory import kept_memory
from msformer.model import MINIMUM_SIZE, MSFormer
from msformer.presets import DEFAULT, LossWeights, Preset, Size, find_preset
from msformer.streams import own_stream
from msformer_kernels.core.backends import resolve

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
    preset: str = DEFAULT,
    size: Size | Literal["preset"] = "preset",
    max_steps: int | None = None,
    min_labels: int | None = None,
    seed: int = 0,
    weights: LossWeights | None = None,
    embed_dim: int | None = None,
    num_clusters: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    learning_rate: float | None = None,
    momentum: float | None = None,
    icnr: bool | None = None,
    standardise: bool | None = None,
    margin: int | None = None,
    window: tuple[float, float] | None = None,
    slice_index: int | None = None,
    modality: str | None = None,
    device: str | torch.device = "auto",
    backend: str | None = None,
    progress: Progress | bool | None = None,
) -> Segmentation:
    """Segments one image without labels, by fitting an MS-Former to it.

    The same image, settings, machine, backend and number of threads give the same map, bit for bit. The global random
    state is left as it was. May be called from several threads: on a GPU each fit has a stream of its own.

    Args:
        image: a path, read as `msformer.io.read.read_image` says; a PIL image; an array ``[H, W]``, ``[H, W, 1]``,
            ``[H, W, 3]`` or ``[H, W, 4]`` (alpha is dropped); or a tensor ``[1 or 3, H, W]``. 8-bit values are divided
            by 255; 16-bit and floating-point values are stretched from their minimum and maximum to 0 and 1.
        preset: a name in `msformer.presets.PRESETS`; what is not given below is as it says.
        size: side the image is resized to (area-weighted when shrinking), or (height, width); None keeps its size.
        max_steps: steps at most.
        min_labels: the fit stops when the map has no more labels than this.
        seed: of the initial weights.
        weights: factors of the losses.
        embed_dim, num_clusters, depth, num_heads: of the `MSFormer`; num_clusters is embed_dim unless given.
        learning_rate, momentum: of stochastic gradient descent.
        icnr: the upsampling starts equal for the four pixels of a square, see `MSFormer.initialise_icnr`.
        standardise: each channel of the resized image is brought to mean 0 and variance 1.
        margin: pixels mirrored around the resized image, and taken off the label map.
        window: the values that become black and white, of any grey image; None: what the file says, else the usual for
            its kind.
        slice_index: the slice of a NIfTI volume, counted from the feet, or the frame of a DICOM file; None: the middle.
        modality: of a file, as DICOM abbreviates it (``"CT"``, ``"MR"``); None: what the file says.
        device: ``"auto"`` (the GPU if there is one), or as in PyTorch.
        backend: of the kernels, see `msformer_kernels.use_backend`.
        progress: called as ``progress(step, labels, loss)`` before each step; True prints a line each.

    Raises:
        ValueError: an image that is not one, too small or not finite; a slice that it does not have; a setting out of
            range, an unknown backend.
        OSError: a path that cannot be read.
        FloatingPointError: the loss became NaN or infinite.
    """
    settings = find_preset(
        preset,
        max_steps=max_steps,
        min_labels=min_labels,
        weights=weights,
        embed_dim=embed_dim,
        num_clusters=num_clusters,
        depth=depth,
        num_heads=num_heads,
        learning_rate=learning_rate,
        momentum=momentum,
        icnr=icnr,
        standardise=standardise,
        margin=margin,
    )
    if size != "preset":
        settings = replace(settings, size=size)
    return fit_image(
        prepare_image(image, Reading(window, slice_index, modality)),
        settings,
        seed,
        device,
        backend,
        _reporter(progress),
    )


def fit_image(
    image: Tensor, settings: Preset, seed: int, device: str | torch.device, backend: str | None, report: Progress
) -> Segmentation:
    """`segment` of an image as `prepare_image` makes it, ``[3, H, W]`` in [0, 1], which is not stretched again."""
    original = image.shape[1], image.shape[2]
    target = _target_size(settings.size, original, settings.margin)
    fitted_image = framed(resize_image(image, target), settings)
    chosen_device = find_device(device)
    started = time.perf_counter()
    with (
        own_stream(chosen_device),
        msformer_kernels.use_backend(backend) if backend is not None else nullcontext(),
        kept_memory(),
    ):
        used = resolve(None, chosen_device.type, torch.float32)
        with seeded(seed, chosen_device):
            model = MSFormer(3, settings.embed_dim, settings.num_clusters, settings.depth, settings.num_heads)
        if settings.icnr:
            model.initialise_icnr()
        model.to(chosen_device)
        fitted_image = fitted_image.to(chosen_device)
        rule = Rule(
            settings.weights, settings.learning_rate, settings.momentum, settings.max_steps, settings.min_labels
        )
        history = fit(model, fitted_image, rule, report)
        whole = label_map(model, fitted_image)
    inner = slice(settings.margin, -settings.margin or None)
    found = order_by_area(whole[inner, inner])
    seconds = time.perf_counter() - started
    return Segmentation(
        labels=found,
        labels_full=resize_labels(found, original),
        num_labels=int(found.max()) + 1,
        steps=len(history.losses),
        settled=history.label_counts[-1] <= settings.min_labels,
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


def _target_size(size: Size | str, original: tuple[int, int], margin: int) -> tuple[int, int]:
    if isinstance(size, str):
        raise ValueError(f"size: expected a number of pixels, (height, width) or None, got {size!r}")
    height, width = original if size is None else (size, size) if isinstance(size, int) else size
    if min(height, width) < MINIMUM_SIZE:
        what = "image" if size is None else "size"
        raise ValueError(f"{what}: {height} x {width} pixels are too small, expected at least {MINIMUM_SIZE} each way")
    if margin >= min(height, width):
        raise ValueError(f"margin: expected less than the image's {min(height, width)} pixels, got {margin}")
    return height, width


def framed(image: Tensor, preset: Preset) -> Tensor:
    """``[3, h, w]`` -> ``[1, 3, h, w]`` as it is fitted, with its margin."""
    if preset.standardise:
        image = standardise_channels(image)
    return F.pad(image[None], (preset.margin,) * 4, mode="reflect")


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
