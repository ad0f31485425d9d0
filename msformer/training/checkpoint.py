"""The state of a training on disk, so that one that was stopped goes on to the same weights.

``checkpoint.pt`` holds weights, buffers, the optimiser's state, round and step, the losses so far and PyTorch's random
state, with the settings and a hash of the images. What a step sees follows from the seed and its number (`batches`), so
the step is the position in the data, too, and in the schedule of the learning rate.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from msformer.output import complete_file

CHECKPOINT = "checkpoint.pt"
FORMAT = 1


@dataclass
class State:
    """How far a training is."""

    settings: dict[str, Any]
    """All that decides the weights, as plain values."""
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


def read(folder: Path, settings: dict[str, Any]) -> State | None:
    """The state in a folder; None if there is none.

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
            raise ValueError("it is of another version of msformer")
        random = content.pop("random")
        found = State(**content)
    except (ValueError, KeyError, TypeError, RuntimeError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: not a checkpoint that can be used ({error}); {instead}") from error
    different = [
        f"{name} was {found.settings.get(name)!r}, now {settings.get(name)!r}"
        for name in {**settings, **found.settings}
        if found.settings.get(name) != settings.get(name)
    ]
    if different:
        raise ValueError(f"{path}: a training with other settings ({'; '.join(different)}); {instead}")
    torch.set_rng_state(random)
    return found
