"""The state of a training on disk, so that one that was stopped goes on to the same weights.

``checkpoint.pt`` holds weights, buffers, the optimiser's state, round and step, the losses so far and PyTorch's random
state, with the settings and hashes of the images. What a step sees follows from the seed and its number (`batches`), so
the step is the position in the data, too, and in the schedule of the learning rate.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from msformer.output import complete_file

CHECKPOINT = "checkpoint.pt"
FORMAT = 2
Identity = tuple[Mapping[str, Any], Mapping[str, str]]
"""Settings and images of a training, as in `State`."""


@dataclass
class State:
    """How far a training is."""

    settings: dict[str, Any]
    """All that decides the weights but for the images, as plain values."""
    images: dict[str, str] = field(default_factory=dict)
    """What decides each image and its target, by its name."""
    round: int = 1
    step: int = 0
    """Steps of this round that were taken."""
    network: dict[str, Any] | None = None
    optimizer: dict[str, Any] | None = None
    teacher: dict[str, Any] | None = None
    """The network after the round before, which the images of this one were chosen with."""
    history: dict[str, list[float]] = field(default_factory=dict)
    """Value of each loss, and the agreement, at each step of all rounds."""
    seconds: float = 0.0
    """That training took so far."""
    waited: float = 0.0
    """Of these, for batches."""
    complete: bool = False


def write(state: State, folder: Path) -> None:
    """Writes the state; one that was there before stays until this is whole.

    Raises:
        OutputError: it cannot be written.
    """
    content = {**vars(state), "format": FORMAT, "random": torch.get_rng_state()}
    path = folder / CHECKPOINT
    buffer = io.BytesIO()  # written by torch itself, a full disk would be a RuntimeError
    torch.save(content, buffer)
    with complete_file(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def read(folder: Path, settings: Mapping[str, Any], images: Mapping[str, str] | None = None) -> State | None:
    """The state in a folder; None if there is none. Puts PyTorch's random state back.

    Args:
        settings: some or all of a state's, which have to be the same.
        images: those of the training; None if they are not known yet.

    Raises:
        ValueError: it is of other settings or images, of another version, or damaged; the message says what differs.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    instead = "take another folder, or --overwrite to train anew"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content.pop("format") != FORMAT:
            raise ValueError(f"{path}: a checkpoint of another version of msformer; {instead}")
        random = content.pop("random")
        found = State(**content)
    except (KeyError, TypeError, RuntimeError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: damaged, or no checkpoint of a training; {instead}") from error
    now = settings, found.images if images is None else images
    different = list(differences((found.settings, found.images), now))
    if different:
        raise ValueError(f"{path}: a training with other settings or images ({'; '.join(different)}); {instead}")
    torch.set_rng_state(random)
    return found


def differences(before: Identity, now: Identity) -> Iterator[str]:
    """In words, which of the settings now are others than before; if none is, what became of the images."""
    (settings, images), (settings_now, images_now) = before, now
    different = [name for name, value in settings_now.items() if settings.get(name) != value]
    for name in different:
        yield f"{name} was {settings.get(name)!r}, now {settings_now[name]!r}"
    if different:
        return  # which make other targets of the same images
    changed = [name for name in images if name in images_now and images[name] != images_now[name]]
    kinds = {"new": images_now.keys() - images.keys(), "gone": images.keys() - images_now.keys(), "changed": changed}
    for kind, names in kinds.items():
        if names:
            yield f"{len(names)} of the images used {'is' if len(names) == 1 else 'are'} {kind}, such as {min(names)}"
    if not any(kinds.values()) and list(images) != list(images_now):
        yield "the images are in another order"
