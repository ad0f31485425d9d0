// Blocks of tokens whose features lie side by side: [tokens, features].
#pragma once

#include "problem.h"

namespace msformer::MSFORMER_VARIANT {

template <class E>
class Rows {
  using T = typename E::Value;
  using Element = typename E::Element;

 public:
  static constexpr std::int64_t kTokens = kBlockTokens;

  Rows(Arena& arena, const Problem<E>& problem)
      : p_(problem),
        keys_(arena.take<T>(kTokens * p_.key_width)),
        values_(arena.take<T>(kTokens * p_.value_width)),
        grad_keys_(arena.take<T>(kTokens * p_.key_width)),
        grad_values_(arena.take<T>(kTokens * p_.value_width)),
        factors_(arena.take<T>(kTokens)) {}

  // adds keys and values of one block to the sums
  void add_keys(const KeyTensors& from, std::int64_t batch, std::int64_t head, std::int64_t token, std::int64_t tokens,
                KeySums<T> sums) {
    // the context is returned with all bits of the arithmetic type
    p_.engine.is_exact() ? add_keys_by(p_.engine, from, batch, head, token, tokens, sums)
                         : add_keys_by(Values<T>(), from, batch, head, token, tokens, sums);
  }

  // packed: the context as a right-hand side
  void write_output(std::int64_t batch, std::int64_t head, std::int64_t token, std::int64_t tokens, const T* context,
                    const Element* packed) {
    load_queries(batch, head, token, tokens, context);
    multiply(p_.engine, tokens, p_.keys, p_.value_width, keys_, p_.key_width, packed, values_, p_.value_width);
    scale_rows(values_, tokens * p_.value_width, static_cast<T>(p_.a.output_scale));
    store_tokens(p_.a.output, batch, head, token, tokens, p_.values, values_, p_.value_width);
  }

  // of one block: grad_query, and its part of the gradient of context and key sum, without output_scale
  void write_query_gradient(std::int64_t batch, std::int64_t head, std::int64_t token, std::int64_t tokens,
                            const T* context, const Element* context_transposed, T* grad_context) {
    const std::int64_t width = p_.key_width;
    load_queries(batch, head, token, tokens, context);
    load_tokens(p_.a.grad_output, batch, head, token, tokens, p_.values, grad_values_, p_.value_width);
    multiply_transposed_add(p_.engine, p_.keys, tokens, p_.value_width, keys_, width, grad_values_, p_.value_width,
                            grad_context, p_.value_width);
    multiply(p_.engine, tokens, p_.values, width, grad_values_, p_.value_width, context_transposed, grad_keys_, width);
    const T scale = p_.query_factor(batch) * static_cast<T>(p_.a.output_scale);
    if (p_.query_softmax()) {
      softmax_rows_backward(keys_, grad_keys_, tokens, 1, width, scale);
    } else {
      if (p_.divides()) divide_backward(tokens, context + p_.key_sum_at(), grad_context + p_.key_sum_at());
      if (p_.relu())
        relu_rows_backward(keys_, grad_keys_, tokens * width, scale);
      else
        scale_rows(grad_keys_, tokens * width, scale);
    }
    store_tokens(p_.a.grad_query, batch, head, token, tokens, p_.keys, grad_keys_, width);
  }

  void write_key_gradient(const KeyTensors& from, std::int64_t batch, std::int64_t head, std::int64_t token,
                          std::int64_t tokens, const T* grad_context, const Element* grad_packed,
                          const Element* grad_transposed, KeyStatistics<T> statistics) {
    const std::int64_t width = p_.key_width;
    weigh(from, batch, head, token, tokens, grad_context, grad_transposed, statistics);
    multiply(p_.engine, tokens, p_.keys, p_.value_width, keys_, width, grad_packed, grad_values_, p_.value_width);
    apply_mask<T>(from.mask, batch, token, tokens, T(0), grad_values_, p_.value_width, nullptr, 0);
    store_tokens(from.grad_value, batch, head, token, tokens, p_.values, grad_values_, p_.value_width);
    const T scale = p_.key_factor(batch);
    if (p_.softmax()) {
      if (p_.is_all(tokens)) key_softmax_delta_of_block(tokens, width, keys_, grad_keys_, statistics.delta);
      key_softmax_backward(tokens, width, keys_, statistics.delta, grad_keys_);
    }
    if (p_.relu())
      relu_rows_backward(keys_, grad_keys_, tokens * width, scale);
    else
      scale_rows(grad_keys_, tokens * width, scale);
    apply_mask<T>(from.mask, batch, token, tokens, T(0), grad_keys_, width, nullptr, 0);
    store_tokens(from.grad_key, batch, head, token, tokens, p_.keys, grad_keys_, width);
  }

  // adds what the block has of delta, the sum over tokens of weights times their gradients
  void add_delta(const KeyTensors& from, std::int64_t batch, std::int64_t head, std::int64_t token, std::int64_t tokens,
                 const T* grad_context, const Element* grad_transposed, KeyStatistics<T> statistics) {
    weigh(from, batch, head, token, tokens, grad_context, grad_transposed, statistics);
    add_key_softmax_delta(tokens, p_.key_width, keys_, grad_keys_, statistics.delta);
  }

 private:
  // keys become weights, and grad_keys_ the gradients of these
  void weigh(const KeyTensors& from, std::int64_t batch, std::int64_t head, std::int64_t token, std::int64_t tokens,
             const T* grad_context, const Element* grad_transposed, KeyStatistics<T> statistics) {
    const std::int64_t width = p_.key_width;
    load_keys(from, batch, head, token, tokens);
    if (p_.softmax()) key_softmax(tokens, width, keys_, statistics.max, statistics.inverse_sum);
    multiply(p_.engine, tokens, p_.values, width, values_, p_.value_width, grad_transposed, grad_keys_, width,
             p_.divides() ? grad_context + p_.key_sum_at() : nullptr);
  }

  template <class Exact>
  void add_keys_by(const Exact& engine, const KeyTensors& from, std::int64_t batch, std::int64_t head,
                   std::int64_t token, std::int64_t tokens, KeySums<T> sums) {
    load_keys(from, batch, head, token, tokens);
    if (p_.softmax()) return accumulate_keys(engine, tokens, p_.keys, keys_, values_, p_.value_width, sums);
    if (p_.relu()) add_column_sums(tokens, p_.key_width, keys_, p_.key_width, sums.sum);
    multiply_transposed_add(engine, p_.keys, tokens, p_.value_width, keys_, p_.key_width, values_, p_.value_width,
                            sums.values, p_.value_width);
  }

  void load_keys(const KeyTensors& from, std::int64_t batch, std::int64_t head, std::int64_t token,
                 std::int64_t tokens) {
    load_tokens(from.key, batch, head, token, tokens, p_.keys, keys_, p_.key_width);
    load_tokens(from.value, batch, head, token, tokens, p_.values, values_, p_.value_width);
    scale_rows(keys_, tokens * p_.key_width, p_.key_factor(batch));
    if (p_.relu()) relu_rows(keys_, tokens * p_.key_width);
    apply_mask(from.mask, batch, token, tokens, p_.masked_logit(), keys_, p_.key_width, values_, p_.value_width);
  }

  // rho_q; where ReLU attention divides, 1 / its sums are kept
  void load_queries(std::int64_t batch, std::int64_t head, std::int64_t token, std::int64_t tokens, const T* context) {
    const std::int64_t width = p_.key_width;
    load_tokens(p_.a.query, batch, head, token, tokens, p_.keys, keys_, width);
    scale_rows(keys_, tokens * width, p_.query_factor(batch));
    if (p_.relu()) relu_rows(keys_, tokens * width);
    if (p_.divides()) {
      const T *key_sum = context + p_.key_sum_at(), eps = static_cast<T>(p_.a.eps);
      for (std::int64_t i = 0; i < tokens; ++i) {
        factors_[i] = T(1) / (dot_rows(keys_ + i * width, key_sum, width) + eps);
        scale_rows(keys_ + i * width, width, factors_[i]);
      }
    }
    if (!p_.query_softmax()) return;
    set_padding(keys_, tokens, p_.keys, width, -kInfinity<T>);
    softmax_rows(keys_, tokens, 1, width);
  }

  // phi / (phi . z + eps): grad (in place) becomes that of phi, and what z gets is added to grad_sum
  void divide_backward(std::int64_t tokens, const T* key_sum, T* grad_sum) {
    const std::int64_t width = p_.key_width;
    for (std::int64_t i = 0; i < tokens; ++i) {
      const T *q = keys_ + i * width, dot = dot_rows(q, grad_keys_ + i * width, width);
      add_scaled(-dot, q, width, grad_sum);
      add_scaled(-dot, key_sum, width, grad_keys_ + i * width);
      scale_rows(grad_keys_ + i * width, width, factors_[i]);
    }
  }

  const Problem<E>& p_;
  T *keys_, *values_, *grad_keys_, *grad_values_, *factors_;
};

}  // namespace msformer::MSFORMER_VARIANT
