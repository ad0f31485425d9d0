"""The cases of the operators, a module each."""

from tests.kernels.cases.base import Case, Cases, Tensors, cast, require, run
from tests.kernels.cases.batch_norm import batch_norm_case
from tests.kernels.cases.efficient_attention import attention_case
from tests.kernels.cases.efficient_self_attention import self_attention_case
from tests.kernels.cases.linear import linear_case
from tests.kernels.cases.mix_ffn import mix_ffn_case

__all__ = [
    "Case",
    "Cases",
    "Tensors",
    "attention_case",
    "batch_norm_case",
    "cast",
    "linear_case",
    "mix_ffn_case",
    "require",
    "run",
    "self_attention_case",
]
