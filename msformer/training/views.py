"""What a network sees in an image of the pool while it is being trained, for further rounds and for the report."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msformer.io.prepare import resize_image
from msformer.model import MSFormer
from msformer.training.predict import probabilities
from msformer.training.sight import Sight


@torch.no_grad()
def shares(network: MSFormer, image: Tensor, sight: Sight, size: int) -> Tensor:
    """Probabilities of the labels ``[K, H, W]`` of an image ``[3, H, W]``, uint8, painted, seen at `size` pixels; in
    float32 on the CPU. The network is in evaluation mode meanwhile.
    """
    training = network.training
    network.eval()
    device = next(network.parameters()).device
    seen = sight.scale(resize_image(image.float() / 255, (size, size)))
    found = probabilities(network, seen[None].to(device))
    network.train(training)
    shape = (image.shape[1], image.shape[2])
    return torch.nn.functional.interpolate(found, size=shape, mode="bilinear", antialias=True)[0].cpu()


def object_probability(network: MSFormer, image: Tensor, sight: Sight, size: int) -> NDArray[np.float32]:
    """Of the object ``[H, W]``, by a network that was taught it."""
    found: NDArray[np.float32] = shares(network, image, sight, size)[1].numpy()
    return found
