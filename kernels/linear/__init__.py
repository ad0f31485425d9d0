"""A linear layer on tokens."""

from msformer_kernels.linear.api import linear
from msformer_kernels.linear.layer import TokenLinear

__all__ = ["TokenLinear", "linear"]
