// Memory tokens in the folded form: further keys and values, the same for every image, that are not made from x.
//
// They take part in the softmax over tokens of every key feature j with weights p_mj, and leave t_j = 1 - sum_m p_mj to
// the tokens of the image. So with A_j, the sum of tokens under their weights, the context is
//     G_j = A_j W_v + t_j b_v + sum_m p_mj v_m,
// and, dG being its gradient, the gradient of a weight is <v_m, dG_j> for the memory and x_n dA_j + <b_v, dG_j> for a
// token. Taking <b_v, dG_j> off both leaves tokens as they are without a memory, but for the mean under the softmax:
//     delta_j = <A_j, dA_j> + sum_m p_mj <v_m - b_v, dG_j>.
#pragma once

#include "../attention/softmax.h"
#include "self_attention.h"

namespace msformer::MSFORMER_VARIANT {

template <class T>
class MemoryTokens {
 public:
  const std::int64_t count;

  MemoryTokens(Arena& arena, const SelfAttentionArguments& a)
      : count(a.memory_tokens),
        a_(a),
        keys_(arena.take<T>(a.heads * count * key_width_)),
        values_(arena.take<T>(a.heads * count * value_width_)),
        bias_(arena.take<T>(a.heads * value_width_)) {}

  void fill_in() {
    for (std::int64_t head = 0; head < a_.heads; ++head) {
      load_tokens(a_.memory_key, 0, head, 0, count, head_keys_, keys_ + head * count * key_width_, key_width_);
      load_tokens(a_.memory_value, 0, head, 0, count, head_values_, values_ + head * count * value_width_,
                  value_width_);
      const T* bias = static_cast<const T*>(a_.parameters.value_bias);
      copy_padded(bias_ + head * value_width_, bias ? bias + head * head_values_ : nullptr, head_values_);
    }
  }

  // maximum and sum over the tokens of an image, and the tokens under their weights, become those over all tokens
  void join(std::int64_t row, std::int64_t leading, T* max, T* sum, T* tokens) const {
    T largest = *max;
    for (std::int64_t m = 0; m < count; ++m) largest = max_of(key(m, row), largest);
    const double of_tokens = *sum == T(0) ? 0.0 : static_cast<double>(*sum) * exponential(*max, largest);
    double total = of_tokens;
    for (std::int64_t m = 0; m < count; ++m) total += exponential(key(m, row), largest);
    if (total == 0) total = __builtin_nan("");
    scale_rows(tokens, leading, static_cast<T>(of_tokens / total));
    *max = largest;
    *sum = static_cast<T>(total);
  }

  // p_mj
  T weight(std::int64_t m, std::int64_t row, T max, T sum) const {
    return static_cast<T>(exponential(key(m, row), max) / static_cast<double>(sum));
  }

  // t_j; `kept`: whether any token of the image is
  T left(std::int64_t row, T max, T sum, bool kept) const {
    double of_memory = 0;
    for (std::int64_t m = 0; m < count; ++m) of_memory += exponential(key(m, row), max) / static_cast<double>(sum);
    return kept ? static_cast<T>(1 - of_memory) : T(0);
  }

  void add_to_context(std::int64_t row, T max, T sum, bool kept, T* context) const {
    const std::int64_t head = row / head_keys_;
    add(left(row, max, sum, kept), bias_ + head * value_width_, context);
    for (std::int64_t m = 0; m < count; ++m) add(weight(m, row, max, sum), value(m, head), context);
  }

  // what delta_j gains
  T of_delta(std::int64_t row, T max, T sum, const T* grad_context) const {
    double found = 0;
    for (std::int64_t m = 0; m < count; ++m)
      found += static_cast<double>(weight(m, row, max, sum)) * gain(m, row, grad_context);
    return static_cast<T>(found);
  }

  // The gradients, of all images: calls row_of(batch, row, max, sum, delta, grad_context) for what they are made of.
  template <class RowOf>
  void write_gradients(const RowOf& row_of) const {
    const std::int64_t size = count * (key_width_ + value_width_);
    const std::size_t bytes = (sizeof(double) + sizeof(T)) * static_cast<std::size_t>(size);
    parallel_for(a_.heads, a_.num_threads, bytes, [&](std::int64_t head, void* memory) {
      double* totals = static_cast<double*>(memory);
      T *grad_keys = reinterpret_cast<T*>(totals + size), *grad_values = grad_keys + count * key_width_;  // of an image
      for (std::int64_t i = 0; i < size; ++i) totals[i] = 0;
      for (std::int64_t batch = 0; batch < a_.batch; ++batch) {
        fill(grad_keys, size, T(0));
        for (std::int64_t j = 0; j < head_keys_; ++j) {
          const std::int64_t row = head * head_keys_ + j;
          T max, sum, delta;
          const T* grad_context;
          row_of(batch, row, max, sum, delta, grad_context);
          for (std::int64_t m = 0; m < count; ++m) {
            const T p = weight(m, row, max, sum);
            if (p != T(1))  // a token that has all the weight gets exactly no gradient
              grad_keys[m * key_width_ + j] +=
                  p * static_cast<T>(gain(m, row, grad_context) - static_cast<double>(delta));
            add(p, grad_context, grad_values + m * value_width_);
          }
        }
        for (std::int64_t i = 0; i < size; ++i) totals[i] += static_cast<double>(grad_keys[i]);
      }
      for (std::int64_t i = 0; i < size; ++i) grad_keys[i] = static_cast<T>(totals[i]);
      store_tokens(a_.grad_memory_key, 0, head, 0, count, head_keys_, grad_keys, key_width_);
      store_tokens(a_.grad_memory_value, 0, head, 0, count, head_values_, grad_values, value_width_);
    });
  }

 private:
  T key(std::int64_t m, std::int64_t row) const {
    return keys_[(row / head_keys_ * count + m) * key_width_ + row % head_keys_];
  }
  const T* value(std::int64_t m, std::int64_t head) const { return values_ + (head * count + m) * value_width_; }

  static double exponential(T logit, T max) {
    return __builtin_exp(static_cast<double>(max == -kInfinity<T> ? logit : logit - max));
  }

  // <v_m - b_v, dG_j>
  double gain(std::int64_t m, std::int64_t row, const T* grad_context) const {
    const std::int64_t head = row / head_keys_;
    const T *v = value(m, head), *bias = bias_ + head * value_width_;
    double sum = 0;
    for (std::int64_t c = 0; c < head_values_; ++c)
      sum += (static_cast<double>(v[c]) - static_cast<double>(bias[c])) * static_cast<double>(grad_context[c]);
    return sum;
  }

  void add(T factor, const T* x, T* out) const {
    for (std::int64_t c = 0; c < value_width_; c += kWidth<T>) store(out + c, load(out + c) + load(x + c) * factor);
  }

  const SelfAttentionArguments& a_;
  const std::int64_t head_keys_ = a_.key_channels / a_.heads, head_values_ = a_.value_channels / a_.heads;
  const std::int64_t key_width_ = padded<T>(head_keys_), value_width_ = padded<T>(head_values_);
  T *keys_, *values_, *bias_;
};

}  // namespace msformer::MSFORMER_VARIANT
