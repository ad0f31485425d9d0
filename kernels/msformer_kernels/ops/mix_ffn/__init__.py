"""MixFFN (SegFormer) and MixFFN-skip (MISSFormer, MS-Former)."""

from msformer_kernels.ops.mix_ffn.api import mix_ffn

__all__ = ["mix_ffn"]
