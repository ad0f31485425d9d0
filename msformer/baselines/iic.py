"""Invariant information clustering of one image.

Ji, Henriques, Vedaldi, "Invariant Information Clustering for Unsupervised Image Classification and Segmentation", ICCV
2019, section 3.3: the clusters of a pixel and of its neighbours in a transformed copy of the image should tell as much
about each other as they can. The network is the segmentation trunk of the paper's code.

It is heavy, so images are shrunk to `SIDE` pixels at most, where a step takes about half a second on two cores, and the
probabilities are brought back to the size of the image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msformer.baselines import LabelMap, Method, Task
from msformer.io.prepare import resize_image
from msformer.segmentation import seeded
from msformer.streams import own_stream

CLUSTERS = 3
OVERCLUSTERS = 5 * CLUSTERS
REACH = 10
"""Largest displacement of a neighbour, pixels."""
SIDE = 97
STEPS = 60


def convolution(inputs: int, outputs: int, dilation: int = 1) -> list[nn.Module]:
    """3x3, with BatchNorm and ReLU."""
    layer = nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation, bias=False)
    return [layer, nn.BatchNorm2d(outputs), nn.ReLU()]


class Network(nn.Module):
    """``[B, 3, h, w]`` -> logits of both heads ``[B, K, h / 2, w / 2]``, rounded down."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *convolution(3, 64),
            *convolution(64, 128),
            nn.MaxPool2d(2),
            *convolution(128, 256),
            *convolution(256, 256),
            *convolution(256, 512, dilation=2),
            *convolution(512, 512, dilation=2),
        )
        self.heads = nn.ModuleList([nn.Conv2d(512, clusters, 1) for clusters in (CLUSTERS, OVERCLUSTERS)])

    def forward(self, images: Tensor, head: int, size: tuple[int, int]) -> Tensor:
        """Probabilities ``[B, K, *size]`` of one head."""
        probabilities = self.heads[head](self.trunk(images)).softmax(1)
        return F.interpolate(probabilities, size=size, mode="bilinear", align_corners=False)


def information_loss(first: Tensor, second: Tensor, reach: int = REACH) -> Tensor:
    """Minus the mutual information of two probability maps ``[1, K, h, w]``, mean over displacements up to `reach`.

    For each displacement t, P[c, d] is the mean of first_c(u) second_d(u + t) over pixels u, normalised to a sum of 1
    and symmetrised (equations 3 and 5).
    """
    # second as the input, one image a cluster; first as its filters: the joint of all displacements in one product
    joint = F.conv2d(second.permute(1, 0, 2, 3), first.permute(1, 0, 2, 3), padding=reach)  # [d, c, t, t]
    joint = joint.flatten(2).permute(2, 1, 0)  # [t, c, d]
    joint = joint / joint.sum((1, 2), keepdim=True)
    joint = ((joint + joint.transpose(1, 2)) / 2).clamp(min=torch.finfo(joint.dtype).tiny)
    rows, columns = joint.sum(2, keepdim=True), joint.sum(1, keepdim=True)
    return -(joint * (joint.log() - rows.log() - columns.log())).sum((1, 2)).mean()


def jitter(image: Tensor, random: torch.Generator) -> Tensor:
    """Brightness, contrast and saturation changed by up to 0.4, hue by up to 0.125 turns; ``[1, 3, h, w]`` in [0,
    1].
    """
    brightness, contrast, saturation = (1 + 0.4 * (2 * torch.rand(3, generator=random) - 1)).tolist()
    turn = 2 * torch.pi * 0.125 * (2 * torch.rand((), generator=random) - 1)
    image = (image * brightness).clamp(0, 1)
    image = (image.mean() + contrast * (image - image.mean())).clamp(0, 1)
    grey = image.mean(1, keepdim=True)
    # hue: a turn of the colours about the grey axis (Rodrigues' formula)
    cosine, sine = turn.cos(), turn.sin() / 3**0.5
    ones = torch.ones(3, 3)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    rotation = (cosine * torch.eye(3) + (1 - cosine) / 3 * ones + sine * cross).to(image)
    colours = grey + saturation * (image - grey)
    return torch.einsum("cd,bdhw->bchw", rotation, colours).clamp(0, 1)


def label_map(task: Task) -> LabelMap:
    """The most likely cluster of each pixel after the last step; the heads take turns."""
    height, width = task.image.shape[1:]
    scale = min(1.0, SIDE / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    small = resize_image(task.image, (max(2, size[0]), max(2, size[1])))[None]
    random = torch.Generator().manual_seed(task.seed)
    reach = min(REACH, min(small.shape[2:]) - 1)
    with own_stream(task.device):
        with seeded(task.seed, task.device):
            network = Network()
        network = network.to(task.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
        for step in range(STEPS):
            changed = jitter(small, random).flip(3)
            pair = torch.cat([small, changed]).to(task.device).contiguous(memory_format=torch.channels_last)
            found = network(pair, step % 2, (small.shape[2], small.shape[3]))
            loss = information_loss(found[:1], found[1:].flip(3), reach)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            task.report(step + 1, STEPS)
        with torch.no_grad():
            image = small.to(task.device).contiguous(memory_format=torch.channels_last)
            labels = network(image, 0, (height, width)).argmax(1)[0]
    return LabelMap(labels.cpu().numpy(), STEPS)


METHODS = [Method("iic", "IIC", 7, label_map)]
