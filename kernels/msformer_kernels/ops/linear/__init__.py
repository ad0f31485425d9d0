"""A linear layer on tokens."""

from msformer_kernels.ops.linear.api import linear

__all__ = ["linear"]
