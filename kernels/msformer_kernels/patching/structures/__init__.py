"""What the structure of a module may compute, a file for each structure."""

from msformer_kernels.patching.structures.all_mlp_decoder import all_mlp_decoder_plans
from msformer_kernels.patching.structures.attention import attention_plans
from msformer_kernels.patching.structures.block import block_plans
from msformer_kernels.patching.structures.common import Plan, Search
from msformer_kernels.patching.structures.inverted_residual import inverted_residual_plans
from msformer_kernels.patching.structures.linear_attention import linear_attention_plans
from msformer_kernels.patching.structures.mix_ffn import mix_ffn_plans
from msformer_kernels.patching.structures.relu_attention import relu_attention_plans
from msformer_kernels.patching.structures.token_attention import token_attention_plans

SEARCHES: tuple[Search, ...] = (
    block_plans,
    mix_ffn_plans,
    inverted_residual_plans,
    attention_plans,
    linear_attention_plans,
    relu_attention_plans,
    token_attention_plans,
    all_mlp_decoder_plans,
)

__all__ = ["SEARCHES", "Plan", "Search"]
