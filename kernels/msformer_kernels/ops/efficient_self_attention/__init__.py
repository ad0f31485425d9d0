"""Efficient self-attention on tokens, projections included, in the folded form."""

from msformer_kernels.ops.efficient_self_attention.api import efficient_self_attention

__all__ = ["efficient_self_attention"]
