"""Networks as files: weights as safetensors in float32, the architecture as plain numbers in JSON.

A folder holds ``model.safetensors``, ``config.json`` and a model card, ``README.md``. ``config.json`` is written last,
so that a folder with one is complete. Trained models, which know more than their weights, have a description of their
own in its place (`msformer.training.saved`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as tensor_bytes

from msformer.hub import find_folder
from msformer.model import MSFormer
from msformer.output import complete_file, prepare_folder, remove, write_json
from msformer.segmentation import find_device
from msformer.training.card import network_card

WEIGHTS, CONFIG, DESCRIPTION, CARD = "model.safetensors", "config.json", "model.json", "README.md"
"""Names of files; `DESCRIPTION` is that of trained models."""


class ModelError(ValueError):
    """A folder that holds no usable model; the message names it and says why."""


def save_network(folder: str | PathLike[str], network: MSFormer, license: str | None = None) -> None:
    """See `MSFormer.save_pretrained`."""
    folder = Path(folder)
    if (folder / DESCRIPTION).exists():
        raise ValueError(f"folder: {folder} holds a trained model, whose weights these are not; take another")
    content, config = network_bytes(network), architecture_of(network)
    write_model(folder, content, network_card(folder, config, count_weights(network), license), CONFIG, config)


def write_model(folder: Path, content: bytes, card: str, described_in: str, description: Mapping[str, Any]) -> None:
    """Writes the weights, the card and last the description, in the file `described_in`.

    Raises:
        OutputError: the folder cannot be written to.
    """
    prepare_folder(folder)
    remove(folder / described_in)  # an older one is not that of the new weights
    for name, data in ((WEIGHTS, content), (CARD, card.encode())):
        with complete_file(folder / name) as temporary:
            temporary.write_bytes(data)
    write_json(folder / described_in, description)


def load_network(name: str | PathLike[str], revision: str | None, device: str | torch.device) -> MSFormer:
    """See `MSFormer.from_pretrained`."""
    from msformer.training.saved import load

    folder = find_folder(name, (WEIGHTS, CONFIG, DESCRIPTION, CARD), revision)
    if (folder / DESCRIPTION).exists() or not (folder / CONFIG).exists():
        return load(folder, device=device).network.requires_grad_(True)
    try:
        architecture = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{folder / CONFIG}: damaged: {error}") from error
    if not isinstance(architecture, dict):
        raise ModelError(f"{folder / CONFIG}: expected an object, got {architecture!r}")
    return read_network(folder, CONFIG, architecture, weights_of(folder)).to(find_device(device))


def architecture_of(network: MSFormer) -> dict[str, Any]:
    """The arguments of `MSFormer` that make a network with the same weights."""
    block: Any = network.block_s[0]
    return {
        "in_channels": network.patch_embed_s.proj.in_channels,
        "embed_dim": network.linear_up.in_features,
        "num_clusters": network.num_clusters,
        "depth": len(network.block_s),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / network.linear_up.in_features,
    }


def count_weights(network: MSFormer) -> int:
    """Without the running statistics of norms."""
    return sum(parameter.numel() for parameter in network.parameters())


def network_bytes(network: MSFormer) -> bytes:
    """The weights as a safetensors file.

    Raises:
        ValueError: weights that are not finite.
    """
    weights = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    weights = {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
    broken = _not_finite(weights)
    if broken is not None:
        raise ValueError(f"network: its weights hold NaN or infinite values, in {broken}")
    return tensor_bytes(weights, metadata={"format": "pt"})


def weights_of(folder: Path) -> bytes:
    """The safetensors file of a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    try:
        return (folder / WEIGHTS).read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder}: no model, {WEIGHTS} is missing") from error


def read_network(folder: Path, described_in: str, architecture: Mapping[str, Any], content: bytes) -> MSFormer:
    """A network in evaluation mode, on the CPU.

    Args:
        folder, described_in: where it is from, and the file with its architecture, for messages.
        architecture: arguments of `MSFormer`.
        content: of its safetensors file.

    Raises:
        ModelError: an architecture that is none, weights that do not fit, or are not finite.
    """
    try:
        network = MSFormer(**architecture)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{folder / described_in}: {error}") from error
    try:
        network.load_state_dict(read_tensors(content))
    except (RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: {WEIGHTS} does not fit the architecture in {described_in}: {error}") from error
    broken = _not_finite(network.state_dict())
    if broken is not None:
        raise ModelError(f"{folder}: {WEIGHTS} holds NaN or infinite values, in {broken}")
    return network.eval()


def _not_finite(weights: Mapping[str, torch.Tensor]) -> str | None:
    """The name of a tensor that holds NaN or infinite values."""
    return next((name for name, value in weights.items() if not value.isfinite().all()), None)
