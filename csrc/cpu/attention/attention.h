// Efficient attention on query, key and value in memory, for operators that are made of it.
#pragma once

#include "../../abi.h"

namespace msformer::MSFORMER_VARIANT {

void attention_forward(const AttentionArguments& a);
void attention_backward(const AttentionArguments& a);

}  // namespace msformer::MSFORMER_VARIANT
