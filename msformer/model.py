"""MS-Former: a two-scale transformer of efficient attention that is fitted to one image.

Karimijafarbigloo, Azad, Kazerouni, Merhof, "MS-Former: Multi-Scale Self-Guided Transformer for Medical Image
Segmentation", MIDL 2023. Parameter names and shapes are those of the published checkpoints.

Between the patch embeddings and the logits everything is tokens ``[B, N, C]``; images are channels-last views of them,
so that nothing is transposed in memory. Two rewritings, both exact, save work: the linear layer after the upsampled
concatenation is applied to each half (the concatenation is never made), and on the large branch it is multiplied into
`linear_up` before it meets the tokens, at a quarter of their number.
"""

from __future__ import annotations

from os import PathLike
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msformer_kernels import EfficientTransformerBlock, TokenBatchNorm, TokenLinear, linear

PATCH_SIZE = 32
MINIMUM_SIZE = PATCH_SIZE + 1
ATTENTION_SCALE = 64**-0.5  # fixed in the published model, whatever the width


class MSFormerOutput(NamedTuple):
    """What `MSFormer.forward` returns."""

    logits: Tensor
    """``[B, num_clusters, H, W]``, channels-last in memory."""
    attention: Tensor
    """``[B, T, T]``: between two crops of the normalised logits, shifted by one pixel, in T patches of 32x32."""
    context_small: Tensor
    """``[B, C, C / num_heads]``: the context of the last full-resolution block, its heads one below the other."""
    context_large: Tensor
    """The same of the half-resolution branch."""


class PatchEmbedding(nn.Module):
    """3x3 convolution and BatchNorm: image ``[B, in_channels, H, W]`` -> tokens and their height and width."""

    def __init__(self, in_channels: int, embed_dim: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, embed_dim, 3, stride=stride, padding=1)
        self.norm = TokenBatchNorm(embed_dim)

    def forward(self, image: Tensor) -> tuple[Tensor, int, int]:
        if image.is_cuda:
            tokens, height, width = convolution_as_product(self.proj, image)
            return self.norm(tokens), height, width
        features = self.proj(image.contiguous(memory_format=torch.channels_last))
        return self.norm(as_tokens(features)), features.shape[2], features.shape[3]


def convolution_as_product(convolution: nn.Conv2d, image: Tensor) -> tuple[Tensor, int, int]:
    """A convolution with padding 1 as a product of its unfolded input: tokens ``[B, N, C]``, height and width.

    For GPUs: the gradients of cuDNN's convolutions need not be the same bits in every run.
    """
    stride = convolution.stride[0]
    height, width = ((size - 1) // stride + 1 for size in image.shape[2:])
    patches = F.unfold(image, 3, padding=1, stride=stride).transpose(1, 2)  # [B, N, 9 * in_channels]
    return F.linear(patches, convolution.weight.flatten(1), convolution.bias), height, width


def as_tokens(image: Tensor) -> Tensor:
    """``[B, C, H, W]`` -> ``[B, H * W, C]``, a view of a channels-last image."""
    return image.flatten(2).transpose(1, 2)


class MSFormer(nn.Module):
    """The MS-Former network.

    Args:
        in_channels: of the image.
        embed_dim: C, the width of the transformer blocks.
        num_clusters: K, channels of the logits, the most labels there can be; embed_dim by default.
        depth: blocks in each of the two branches.
        num_heads: attention heads of every block; must divide embed_dim.
        mlp_ratio: hidden width of the feed-forward layers, in units of embed_dim.

    Raises:
        ValueError: sizes below 1, a head count that does not divide.
    """

    def __init__(
        self,
        in_channels: int = 3,
        embed_dim: int = 100,
        num_clusters: int | None = None,
        depth: int = 2,
        num_heads: int = 1,
        mlp_ratio: float = 4,
    ) -> None:
        super().__init__()
        num_clusters = embed_dim if num_clusters is None else num_clusters
        sizes = {"in_channels": in_channels, "embed_dim": embed_dim, "num_clusters": num_clusters, "depth": depth}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        self.num_clusters = num_clusters
        self.patch_embed_s = PatchEmbedding(in_channels, embed_dim, stride=1)
        self.patch_embed_l = PatchEmbedding(in_channels, embed_dim, stride=2)

        def blocks() -> nn.ModuleList:
            return nn.ModuleList(
                EfficientTransformerBlock(embed_dim, num_heads, "mix_skip", mlp_ratio) for _ in range(depth)
            )

        def norms() -> nn.ModuleList:
            return nn.ModuleList(TokenBatchNorm(embed_dim) for _ in range(depth))

        self.block_s, self.bn2_s = blocks(), norms()
        self.block_l, self.bn2_l = blocks(), norms()
        self.linear_up = nn.Linear(embed_dim, 4 * embed_dim, bias=False)
        self.linear_down = nn.Linear(2 * embed_dim, num_clusters, bias=False)
        self.bn3 = TokenBatchNorm(num_clusters)
        # the published model cuts patches in a first, parameterless layer of this sequence
        self.to_patch_embedding = nn.Sequential(
            nn.Identity(), TokenLinear(PATCH_SIZE * PATCH_SIZE * num_clusters, embed_dim)
        )

    def forward(self, image: Tensor, *, attention: bool = True) -> MSFormerOutput:
        """Logits, attention map and contexts of a batch of images ``[B, in_channels, H, W]``.

        Args:
            image: floating point, H and W at least 33.
            attention: False leaves the attention map out (an empty tensor), with the work for it.

        Raises:
            ValueError: a wrong rank or channel count, an image that is too small.
        """
        self._check(image)
        small, height, width = self.patch_embed_s(image)
        large, large_height, large_width = self.patch_embed_l(image)
        small, context_small = _branch(self.block_s, self.bn2_s, small, height, width)
        large, context_large = _branch(self.block_l, self.bn2_l, large, large_height, large_width)
        logits = self._logits(small, large, (height, width), (large_height, large_width))
        attention_map = self._attention_map(logits) if attention else logits.new_empty(image.shape[0], 0, 0)
        return MSFormerOutput(logits, attention_map, context_small, context_large)

    @torch.no_grad()
    def initialise_icnr(self) -> None:
        """Gives the four matrices of `linear_up`, one for each pixel of a square of 2x2, the values of the first.

        Drawn apart, they tell the pixels of a flat area apart by row and column alone, and the fit hardens that into a
        checkerboard of four labels. Aitken et al., "Checkerboard artifact free sub-pixel convolution" (ICNR), 2017,
        arXiv 1707.02937.
        """
        dim = self.linear_up.in_features
        phases = self.linear_up.weight.view(4, dim, dim)
        phases[1:] = phases[0]

    def save_pretrained(self, folder: str | PathLike[str], *, license: str | None = None) -> None:
        """Writes the weights in float32 (``model.safetensors``), the architecture (``config.json``) and a model card.

        Args:
            folder: is made if it is not there; other files in it stay.
            license: of the weights, as the Hugging Face Hub abbreviates it: ``mit``, ``cc-by-4.0``, ...

        Raises:
            ValueError: weights that are not finite, a license that is no identifier, the folder of a trained model.
            OutputError: the folder cannot be written to.
        """
        from msformer.training.weights import save_network

        save_network(folder, self, license)

    @staticmethod
    def from_pretrained(
        name: str | PathLike[str], *, revision: str | None = None, device: str | torch.device = "cpu"
    ) -> MSFormer:
        """A network that `save_pretrained` or ``msformer train`` wrote, in evaluation mode, in float32.

        Args:
            name: its folder, or ``ORG/NAME`` of the Hugging Face Hub (extra ``[hub]``).
            revision: of a model of the Hub: a branch, a tag or a commit.
            device: ``"auto"`` (the GPU if there is one), or as in PyTorch.

        Raises:
            FileNotFoundError: no such folder, or one without a model; a model of the Hub that is not there, or out of
                reach.
            ValueError: damaged files, weights that do not fit, a device that cannot be used, a revision of a folder.
        """
        from msformer.training.weights import load_network

        return load_network(name, revision, device)

    def _check(self, image: Tensor) -> None:
        channels = self.patch_embed_s.proj.in_channels
        if image.dim() != 4 or image.shape[1] != channels:
            raise ValueError(f"image: expected [B, {channels}, H, W], got {tuple(image.shape)}")
        if min(image.shape[2:]) < MINIMUM_SIZE:
            size = f"{image.shape[2]} x {image.shape[3]}"
            raise ValueError(f"image: {size} pixels are too small, expected at least {MINIMUM_SIZE} each way")

    def _logits(self, small: Tensor, large: Tensor, size: tuple[int, int], large_size: tuple[int, int]) -> Tensor:
        """`linear_down` of the concatenation (upsampled large, small), without making either."""
        dim = small.shape[2]
        down_large, down_small = self.linear_down.weight.split(dim, dim=1)
        # linear_up's outputs are ordered (row, column, channel): one C x C matrix for each of the four pixels
        combined = (down_large @ self.linear_up.weight.view(4, dim, dim)).flatten(0, 1)
        pixels = linear(large, combined).unflatten(2, (2, 2, -1)).unflatten(1, large_size)  # [B, h, w, 2, 2, K]
        upsampled = pixels.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        from_small = linear(small, down_small).unflatten(1, size)
        return (from_small + upsampled[:, : size[0], : size[1]]).permute(0, 3, 1, 2)

    def _attention_map(self, logits: Tensor) -> Tensor:
        features = self.bn3(as_tokens(logits)).unflatten(1, logits.shape[2:])
        patches: Tensor = _ShiftedPatches.apply(features)
        # one product for both crops: the embedding's weights are larger than the patches
        query, key = self.to_patch_embedding(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])
        return (query @ key.transpose(1, 2) * ATTENTION_SCALE).softmax(-1)


class _ShiftedPatches(torch.autograd.Function):
    """``[B, H, W, K]`` -> ``[2, B, T, 32 * 32 * K]``: patches of the image without its first row and column, and of
    that without its last ones, each the largest grid that fits, from the top left.

    Written as one function for the sake of its backward: autograd would make a gradient of the whole image for every
    crop, and add them up.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        ctx.shape = features.shape
        grids = [_ShiftedPatches._grid(features, first).transpose(2, 3) for first in (1, 0)]
        return torch.stack(grids).flatten(4).flatten(2, 3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        result = grad.new_zeros(ctx.shape)
        for first, patches in zip((1, 0), grad, strict=True):
            grid = _ShiftedPatches._grid(result, first)
            cells = patches.unflatten(2, (PATCH_SIZE, PATCH_SIZE, -1)).unflatten(1, (grid.shape[1], grid.shape[3]))
            grid += cells.transpose(2, 3)
        return result

    @staticmethod
    def _grid(image: Tensor, first: int) -> Tensor:
        """``[B, H, W, K]`` -> a view ``[B, h, 32, w, 32, K]`` that begins in row and column `first`."""
        rows, columns = ((size - 1) // PATCH_SIZE for size in image.shape[1:3])
        crop = image[:, first : first + rows * PATCH_SIZE, first : first + columns * PATCH_SIZE]
        return crop.unflatten(2, (columns, PATCH_SIZE)).unflatten(1, (rows, PATCH_SIZE))


def _branch(blocks: nn.ModuleList, norms: nn.ModuleList, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Blocks with a BatchNorm after each; returns the tokens and the last context, its heads one below the other."""
    for block, norm in zip(blocks, norms, strict=True):
        x, context = block(x, height, width)
        x = norm(x)
    return x, context.flatten(1, 2)
