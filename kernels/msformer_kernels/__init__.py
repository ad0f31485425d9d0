"""Fused operators and layers for linear efficient attention and MixFFN.

Operators: `efficient_attention`, `efficient_self_attention`, `mix_ffn`, `linear`, `batch_norm`. Layers:
`EfficientAttention`, `MixFFN`, `MixFFNSkip`, `EfficientTransformerBlock`, `TokenLinear`, `TokenBatchNorm`. In models
that were written without them: `patch`.
Backends: `use_backend`, `available_backends`, `explain`.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from msformer_kernels.core.backends import BackendError, available_backends, explain, use_backend
from msformer_kernels.nn import (
    EfficientAttention,
    EfficientTransformerBlock,
    MixFFN,
    MixFFNSkip,
    TokenBatchNorm,
    TokenLinear,
)
from msformer_kernels.ops.batch_norm import batch_norm
from msformer_kernels.ops.efficient_attention import efficient_attention
from msformer_kernels.ops.efficient_self_attention import efficient_self_attention
from msformer_kernels.ops.linear import linear
from msformer_kernels.ops.mix_ffn import mix_ffn

if TYPE_CHECKING:
    from msformer_kernels.patching import patch

try:
    __version__ = version("msformer")
except PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0.0.0+unknown"

__all__ = [
    "BackendError",
    "EfficientAttention",
    "EfficientTransformerBlock",
    "MixFFN",
    "MixFFNSkip",
    "TokenBatchNorm",
    "TokenLinear",
    "__version__",
    "available_backends",
    "batch_norm",
    "efficient_attention",
    "efficient_self_attention",
    "explain",
    "linear",
    "mix_ffn",
    "patch",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    """Imports `patch`, which is half of the package, when it is first used."""
    if name != "patch":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from msformer_kernels.patching import patch

    globals()["patch"] = patch
    return patch
