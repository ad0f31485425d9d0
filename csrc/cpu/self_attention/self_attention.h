// The two forms of efficient self-attention, and which one a shape gets.
#pragma once

#include "../../abi.h"

namespace msformer::MSFORMER_VARIANT {

inline bool self_attention_is_unfolded(const SelfAttentionArguments& a) {
  return a.form == Form::few_tokens && a.batch > 0;
}
void self_attention_unfolded_forward(const SelfAttentionArguments& a);
void self_attention_unfolded_backward(const SelfAttentionArguments& a);

}  // namespace msformer::MSFORMER_VARIANT
