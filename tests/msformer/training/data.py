"""A network that knows something without training: what is darker than the rest of an image is the object."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from msformer import MSFormer
from msformer.training.saved import TrainedModel, load, save_model

FACTS: dict[str, Any] = {"images": 3, "steps": 20, "statistics": {"mean": [0.5, 0.4, 0.3]}, "warnings": []}


@torch.no_grad()
def dark_network(clusters: int = 2, sharpness: float = 20.0, shift: float = 0.0) -> MSFormer:
    """An `MSFormer` of width 6 whose label 1 is what is darker than the mean by `shift` standard deviations; its other
    labels are equally likely elsewhere."""
    torch.manual_seed(0)
    network = MSFormer(3, 6, clusters, depth=1).eval()
    for block in (*network.block_s, *network.block_l):
        for last in (block.attn.reprojection, block.mlp.fc2):
            last.weight.zero_()
            last.bias.zero_()
    for norm in (network.patch_embed_s.norm, network.patch_embed_l.norm, *network.bn2_s, *network.bn2_l):
        norm.eps = 0.0
    convolution = network.patch_embed_s.proj
    convolution.weight.zero_()
    convolution.weight[0, :, 1, 1] = 1 / 3
    convolution.bias.fill_(shift)
    network.linear_up.weight.zero_()
    network.linear_down.weight.zero_()
    network.linear_down.weight[1, 6] = -sharpness
    return network


def save_dark_model(folder: Path, objective: str = "teacher", domain: str = "dermoscopy", **options: Any) -> Path:
    clusters = 2 if objective == "teacher" else 3
    save_model(folder, dark_network(clusters, **options), domain=domain, objective=objective, size=49, training=FACTS)
    return folder


def dark_model(folder: Path, **options: Any) -> TrainedModel:
    return load(save_dark_model(folder, **options), device="cpu")
