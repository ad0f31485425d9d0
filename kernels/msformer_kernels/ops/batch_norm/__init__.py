"""BatchNorm of tokens in training mode."""

from msformer_kernels.ops.batch_norm.api import batch_norm

__all__ = ["batch_norm"]
