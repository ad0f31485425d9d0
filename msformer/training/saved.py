"""A trained network in a folder: weights as safetensors, everything else as JSON, and a model card for people.

``model.safetensors`` holds the weights in float32, ``model.json`` what is needed to use them (architecture,
preprocessing, domain, objective) and how they came about, ``README.md`` the same in words. ``model.json`` is written
last and holds the hash of the weights, so that a folder with one is complete. Nothing in the folder is code, and
nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import msformer
from msformer.hub import find_folder
from msformer.io.prepare import prepare_image
from msformer.io.read import Reading
from msformer.model import MINIMUM_SIZE, MSFormer
from msformer.segmentation import find_device
from msformer.training.card import card
from msformer.training.domains import find_domain
from msformer.training.sight import STANDARDISED, Sight, find_sight
from msformer.training.weights import (
    CARD,
    DESCRIPTION,
    WEIGHTS,
    ModelError,
    architecture_of,
    count_weights,
    network_bytes,
    read_network,
    weights_of,
    write_model,
)

if TYPE_CHECKING:
    from msformer.training.predict import Prediction

FORMAT = 2
"""Of ``model.json``; it rises when an older package could not use a newer model."""
OBJECTIVES = ("teacher", "consistency", "published")
"""``teacher``: two labels, of which label 1 is the object. The others: clusters, of which a rule picks the object."""


_PARTS = {
    "version": str,
    "domain": str,
    "objective": str,
    "architecture": dict,
    "preprocessing": dict,
    "sha256": str,
    "training": dict,
}
"""Of ``model.json``, but for its format."""


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A trained network, ready to be asked, as `load` returns it."""

    network: MSFormer
    """In evaluation mode, in float32, on its device."""
    domain: str
    """The kind of images it was trained on, in `msformer.training.domains`: decides the rules it is fused with."""
    objective: str
    """One of `OBJECTIVES`."""
    size: int
    """Side of the square that images are resized to, pixels."""
    sight: Sight
    """What the network sees of them then."""
    training: Mapping[str, Any]
    """How it was trained: plain JSON, as `save_model` was given it."""
    digest: str
    """SHA-256 of weights, architecture, preprocessing, domain and objective: of all that decides a prediction."""
    version: str
    """Of msformer, that it was written by."""
    folder: Path = field(default=Path())
    license: str | None = None
    """Of the weights, as the model card says it; None where nobody has said it."""

    @classmethod
    def from_pretrained(
        cls, name: str | PathLike[str], *, revision: str | None = None, device: str | torch.device = "auto"
    ) -> TrainedModel:
        """`msformer.load`, under the name that other libraries give it."""
        return load(name, revision=revision, device=device)

    def save_pretrained(self, folder: str | PathLike[str], *, license: str | None = None) -> None:
        """Writes the model, for `load` to read it or to be uploaded to the Hugging Face Hub.

        Args:
            folder: is made if it is not there; other files in it stay.
            license: of the weights, as the Hub abbreviates it: ``mit``, ``cc-by-4.0``, ...; None keeps what it is.

        Raises:
            ValueError: a license that is no such identifier.
            OutputError: the folder cannot be written to.
        """
        save_model(
            folder,
            self.network,
            domain=self.domain,
            objective=self.objective,
            size=self.size,
            training=self.training,
            license=self.license if license is None else license,
            sight=self.sight,
        )

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def doubts(self) -> tuple[str, ...]:
        """Warnings of what came of the training."""
        return tuple(self.training.get("doubts", ()))

    def predict(
        self,
        image: Any,
        *,
        window: tuple[float, float] | None = None,
        slice_index: int | None = None,
        modality: str | None = None,
        **options: Any,
    ) -> Prediction:
        """What the network says of an image of any kind that `msformer.segment` takes.

        Args:
            image: a path, PIL image, array or tensor, see `msformer.segment`.
            window, slice_index, modality: how it is read, see `msformer.segment`.
            options: of `msformer.training.predict.predict`.
        """
        from msformer.training.predict import predict

        return predict(self, prepare_image(image, Reading(window, slice_index, modality)), **options)


def save_model(
    folder: str | PathLike[str],
    network: MSFormer,
    *,
    domain: str,
    objective: str,
    size: int,
    training: Mapping[str, Any],
    license: str | None = None,
    sight: Sight | None = None,
) -> None:
    """Writes a trained network, so that the folder holds a whole model or none.

    Args:
        folder: is made if it is not there; other files in it stay.
        network: on any device, in any floating-point type, not wrapped.
        domain: a key of `msformer.training.domains.DOMAINS`, whose sight the network was trained with.
        objective: one of `OBJECTIVES`.
        size: side of the square that images are resized to for a prediction, pixels.
        training: what a reader of the model card should know of the training (images, steps, seed, seconds, agreement,
            statistics of the images, warnings, ...): plain JSON; the card lists it as it is.
        license: of the weights, as the Hugging Face Hub abbreviates it.
        sight: that the network was trained with, if it is not the domain's.

    Raises:
        ValueError: an unknown domain or objective, a size that is too small, weights that are not finite, a license
            that is no identifier.
        OutputError: the folder cannot be written to.
    """
    folder = Path(folder)
    _check(domain, objective, size)
    content = network_bytes(network)
    description = {
        "format": FORMAT,
        "version": msformer.__version__,
        "domain": domain,
        "objective": objective,
        "architecture": architecture_of(network),
        "preprocessing": {"size": size, "sight": (sight or find_domain(domain).sight).name},
        "sha256": hashlib.sha256(content).hexdigest(),
        "training": dict(training),
        "license": license,
    }
    json.dumps(description)  # raises TypeError before anything is written
    text = card(folder, description, count_weights(network))
    write_model(folder, content, text, DESCRIPTION, description)


def load(
    name: str | PathLike[str], *, revision: str | None = None, device: str | torch.device = "auto"
) -> TrainedModel:
    """Reads a model that `save_model` wrote, by this version of the package or an older one.

    Args:
        name: the folder, or ``ORG/NAME`` of the Hugging Face Hub (extra ``[hub]``).
        revision: of a model of the Hub: a branch, a tag or a commit.
        device: ``"auto"`` (the GPU if there is one), or as in PyTorch.

    Raises:
        FileNotFoundError: no such folder, or one without a model; a model of the Hub that is not there, or out of
            reach.
        ModelError: damaged, of a newer package, of an unknown domain or objective, or with weights that do not fit.
        ValueError: a device that cannot be used, a revision of a folder.
    """
    folder = find_folder(name, (WEIGHTS, DESCRIPTION, CARD), revision)
    description = _read_description(folder)
    content = weights_of(folder)
    if hashlib.sha256(content).hexdigest() != description["sha256"]:
        raise ModelError(f"{folder}: {WEIGHTS} is damaged, or not the file that {DESCRIPTION} was written with")
    try:
        _check(description["domain"], description["objective"], description["preprocessing"]["size"])
        sight = find_sight(description["preprocessing"].get("sight", STANDARDISED.name))  # format 1 knew no other
    except KeyError as error:
        raise ModelError(f"{folder / DESCRIPTION}: {error} is missing") from error
    except (TypeError, ValueError) as error:
        raise ModelError(f"{folder / DESCRIPTION}: {error}") from error
    network = read_network(folder, DESCRIPTION, description["architecture"], content)
    decisive = {name: description[name] for name in ("domain", "objective", "architecture", "preprocessing", "sha256")}
    return TrainedModel(
        network=network.requires_grad_(False).to(find_device(device)),
        domain=description["domain"],
        objective=description["objective"],
        size=description["preprocessing"]["size"],
        sight=sight,
        training=description["training"],
        digest=hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest(),
        version=description["version"],
        folder=folder,
        license=description.get("license"),  # older packages did not know it
    )


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        what = f"no model, {DESCRIPTION} is missing" if folder.is_dir() else "no such folder"
        raise FileNotFoundError(f"{folder}: {what}") from error
    except ValueError as error:
        raise ModelError(f"{path}: damaged: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("format"), int) or found["format"] < 1:
        raise ModelError(f"{path}: not the description of a model")
    if found["format"] > FORMAT:
        raise ModelError(
            f"{path}: format {found['format']}, of msformer {found.get('version')}; this is msformer "
            f"{msformer.__version__}, which knows formats up to {FORMAT}: upgrade it"
        )
    missing = _PARTS.keys() - found.keys()
    if missing:
        raise ModelError(f"{path}: {', '.join(sorted(missing))} is missing")
    for name, kind in _PARTS.items():
        if not isinstance(found[name], kind):
            raise ModelError(f"{path}: {name}: expected {kind.__name__}, got {found[name]!r}")
    return found


def _check(domain: str, objective: str, size: int) -> None:
    find_domain(domain)
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: unknown {objective!r}; expected one of {', '.join(OBJECTIVES)}")
    if not isinstance(size, int):
        raise ValueError(f"size: expected a whole number of pixels, got {size!r}")
    if size < MINIMUM_SIZE:
        raise ValueError(f"size: {size} pixels are too small, expected at least {MINIMUM_SIZE}")
