"""What the Triton kernels are compared with on a GPU: the same layers in plain PyTorch, as one would write them for
speed.

One first product, `Linear` instead of 1x1 convolutions, the depthwise convolution on a channels-last view, softmaxes
and products in the dtype of the input (the reference of `msformer_kernels` computes in float32, and would be too easy
a rival). Parameters are those of the layer that is compared. Needs nothing but torch and msformer_kernels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

import msformer_kernels as kernels


def plain_attention(layer: kernels.EfficientAttention, norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """``x + layer(norm(x))``."""
    tokens, heads = norm(x), layer.num_heads

    def project(projection: nn.Conv2d) -> Tensor:
        out = F.linear(tokens, projection.weight.flatten(1), projection.bias)
        return out.unflatten(-1, (heads, -1)).transpose(1, 2)

    query, key, value = project(layer.queries), project(layer.keys), project(layer.values)
    context = key.softmax(-2).transpose(-1, -2) @ value
    attended = (query.softmax(-1) @ context).transpose(1, 2).flatten(2)
    return x + F.linear(attended, layer.reprojection.weight.flatten(1), layer.reprojection.bias)


def plain_mix_ffn(layer: kernels.MixFFNSkip, norm: nn.LayerNorm, x: Tensor, height: int, width: int) -> Tensor:
    """``x + layer(norm(x))``, MixFFN-skip."""
    hidden = layer.fc1(norm(x))
    image = hidden.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    mixed = layer.dwconv.dwconv(image).permute(0, 2, 3, 1).flatten(1, 2) + hidden
    assert layer.norm1 is not None
    return x + layer.fc2(F.gelu(layer.norm1(mixed)))


def plain_block(block: kernels.EfficientTransformerBlock, x: Tensor, height: int, width: int) -> Tensor:
    assert isinstance(block.mlp, kernels.MixFFNSkip)
    x = plain_attention(block.attn, block.norm1, x)
    return plain_mix_ffn(block.mlp, block.norm2, x, height, width)
