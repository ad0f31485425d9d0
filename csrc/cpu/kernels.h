// The kernels of one instruction set that other kernels are made of, or give way to.
#pragma once

#include "arguments.h"
#include "simd.h"

namespace msformer::MSFORMER_ISA {

void attention_forward(const AttentionArguments& a);
void attention_backward(const AttentionArguments& a);

// whether an image has so few tokens that the form that is not folded takes fewer multiplications
bool self_attention_is_better_unfolded(const SelfAttentionArguments& a);
void self_attention_unfolded_forward(const SelfAttentionArguments& a);
void self_attention_unfolded_backward(const SelfAttentionArguments& a);

// whether an image has so few tokens that it is better worked on as a whole than in strips
bool mix_ffn_fits_whole(const MixFFNArguments& a);
void mix_ffn_whole_forward(const MixFFNArguments& a);
void mix_ffn_whole_backward(const MixFFNArguments& a);

}  // namespace msformer::MSFORMER_ISA
