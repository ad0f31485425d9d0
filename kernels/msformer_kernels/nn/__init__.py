"""The layers over the operators, and the block that is made of them."""

from msformer_kernels.nn.attention import EfficientAttention
from msformer_kernels.nn.batch_norm import TokenBatchNorm
from msformer_kernels.nn.block import EfficientTransformerBlock
from msformer_kernels.nn.linear import TokenLinear
from msformer_kernels.nn.mix_ffn import MixFFN, MixFFNSkip

__all__ = [
    "EfficientAttention",
    "EfficientTransformerBlock",
    "MixFFN",
    "MixFFNSkip",
    "TokenBatchNorm",
    "TokenLinear",
]
