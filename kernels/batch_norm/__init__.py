"""BatchNorm of tokens in training mode."""

from msformer_kernels.batch_norm.api import batch_norm
from msformer_kernels.batch_norm.layer import TokenBatchNorm

__all__ = ["TokenBatchNorm", "batch_norm"]
