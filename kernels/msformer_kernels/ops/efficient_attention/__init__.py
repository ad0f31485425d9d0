"""Efficient attention on query, key and value (Shen et al., 2021)."""

from msformer_kernels.ops.efficient_attention.api import efficient_attention

__all__ = ["efficient_attention"]
