// The two forms of efficient self-attention, and which one a shape gets.
#pragma once

#include "../../abi.h"

namespace msformer::MSFORMER_VARIANT {

// whether an image has so few tokens that the form that is not folded takes fewer multiplications
bool self_attention_is_better_unfolded(const SelfAttentionArguments& a);
void self_attention_unfolded_forward(const SelfAttentionArguments& a);
void self_attention_unfolded_backward(const SelfAttentionArguments& a);

}  // namespace msformer::MSFORMER_VARIANT
