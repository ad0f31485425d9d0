"""MixFFN (SegFormer) and MixFFN-skip (MISSFormer, MS-Former)."""

from msformer_kernels.mix_ffn.api import mix_ffn
from msformer_kernels.mix_ffn.layer import MixFFN, MixFFNSkip

__all__ = ["MixFFN", "MixFFNSkip", "mix_ffn"]
