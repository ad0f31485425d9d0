"""Efficient self-attention on tokens, projections included, in the folded form."""

from msformer_kernels.efficient_self_attention.api import efficient_self_attention
from msformer_kernels.efficient_self_attention.layer import EfficientAttention

__all__ = ["EfficientAttention", "efficient_self_attention"]
