// The two normalisations of efficient attention on blocks in scratch memory: over the features of one token (queries)
// and over all tokens of one feature (keys, online: running maximum, sum and rescaled accumulator, as FlashAttention
// does over keys).
#pragma once

#include "../base/sums.h"
#include "../base/tokens.h"
#include "../engine/products.h"

namespace msformer::MSFORMER_VARIANT {

// rho_q: softmax over each of `segments` slices of `width` values in every row. Padding must hold -infinity.
template <class T>
void softmax_rows(T* x, std::int64_t rows, std::int64_t segments, std::int64_t width) {
  constexpr int W = kWidth<T>;
  for (T* row = x; row < x + rows * segments * width; row += width) {
    Vector<T> largest = load(row);
    for (std::int64_t c = W; c < width; c += W) largest = vmax<T>(largest, load(row + c));
    const T shift = horizontal_max<T>(largest);
    Vector<T> sum{};
    for (std::int64_t c = 0; c < width; c += W) {
      const Vector<T> e = vexp_small(load(row + c) - shift);
      store(row + c, e);
      sum += e;
    }
    const T inverse = T(1) / horizontal_sum<T>(sum);
    for (std::int64_t c = 0; c < width; c += W) store(row + c, load(row + c) * inverse);
  }
}

// grad of the softmax (in place): p * (grad - sum(p * grad)) for every slice, times scale
template <class T>
void softmax_rows_backward(const T* p, T* grad, std::int64_t rows, std::int64_t segments, std::int64_t width, T scale) {
  constexpr int W = kWidth<T>;
  for (std::int64_t r = 0; r < rows * segments; ++r, p += width, grad += width) {
    Vector<T> dot{};
    for (std::int64_t c = 0; c < width; c += W) dot += load(p + c) * load(grad + c);
    const T total = horizontal_sum<T>(dot);
    for (std::int64_t c = 0; c < width; c += W) store(grad + c, load(p + c) * (load(grad + c) - total) * scale);
  }
}

template <class T>
inline void scale_rows(T* x, std::int64_t count, T scale) {
  if (scale == T(1)) return;
  for (std::int64_t i = 0; i < count; i += kWidth<T>) store(x + i, load(x + i) * scale);
}

// sets the padding of rows [channels, leading) to value
template <class T>
inline void set_padding(T* x, std::int64_t rows, std::int64_t channels, std::int64_t leading, T value) {
  for (std::int64_t i = 0; i < rows; ++i) fill(x + i * leading + channels, leading - channels, value);
}

// Sums over the tokens seen so far: values [keys, leading] = sum exp(logit - max) value.
template <class T>
struct KeySums {
  T *max, *sum, *values;

  static std::int64_t size(std::int64_t keys, std::int64_t leading) { return 2 * padded<T>(keys) + keys * leading; }
  KeySums(T* memory, std::int64_t keys)
      : max(memory), sum(memory + padded<T>(keys)), values(memory + 2 * padded<T>(keys)) {}
};

template <class T>
void reset(KeySums<T> sums, std::int64_t keys, std::int64_t leading) {
  fill(sums.max, padded<T>(keys), -kInfinity<T>);
  fill(sums.sum, padded<T>(keys), T(0));
  fill(sums.values, keys * leading, T(0));
}

// exp(logit - max) of one block, in place; max of -infinity (nothing kept so far) counts as 0, so that nothing becomes
// NaN
template <class T>
inline Vector<T> safe_shift(Vector<T> max) {
  return max == -kInfinity<T> ? Vector<T>{} : max;
}

// Adds one block of tokens: logits [tokens, padded(keys)] become exp(logit - max), values [tokens, leading].
template <class E, class T = typename E::Value>
void accumulate_keys(const E& engine, std::int64_t tokens, std::int64_t keys, T* logits, const T* values,
                     std::int64_t leading, KeySums<T> sums) {
  constexpr int W = kWidth<T>;
  const std::int64_t width = padded<T>(keys);
  for (std::int64_t c = 0; c < width; c += W) {
    const Vector<T> before = load(sums.max + c);
    Vector<T> largest = before;
    for (std::int64_t i = 0; i < tokens; ++i) largest = vmax<T>(largest, load(logits + i * width + c));
    const Vector<T> shift = safe_shift<T>(largest), rescale = vexp_small(before - shift);
    Vector<T> sum = load(sums.sum + c) * rescale;
    for (std::int64_t i = 0; i < tokens; ++i) {
      const Vector<T> e = vexp_small(load(logits + i * width + c) - shift);
      store(logits + i * width + c, e);
      sum += e;
    }
    store(sums.max + c, largest);
    store(sums.sum + c, sum);
    for (int lane = 0; lane < W && c + lane < keys; ++lane)
      if (before[lane] != largest[lane]) scale_rows(sums.values + (c + lane) * leading, leading, T(rescale[lane]));
  }
  multiply_transposed_add(engine, keys, tokens, leading, logits, width, values, leading, sums.values, leading);
}

// softmax weights of one block in the backward pass, from the saved max and sum; logits are overwritten
template <class T>
void key_softmax(std::int64_t tokens, std::int64_t width, T* logits, const T* max, const T* inverse_sum) {
  for (std::int64_t c = 0; c < width; c += kWidth<T>) {
    const Vector<T> shift = safe_shift<T>(load(max + c)), inverse = load(inverse_sum + c);
    for (std::int64_t i = 0; i < tokens; ++i)
      store(logits + i * width + c, vexp_small(load(logits + i * width + c) - shift) * inverse);
  }
}

// delta_j = <values_j, grad_j>, the closed form of sum_n s_nj grad_nj; in double, for large terms cancel in grad -
// delta
template <class T>
inline T key_softmax_delta(const T* values, const T* grad, std::int64_t count) {
  double sum = 0;
  for (std::int64_t i = 0; i < count; ++i) sum += static_cast<double>(values[i]) * static_cast<double>(grad[i]);
  return static_cast<T>(sum);
}

// The same for few tokens, block by block: as the sum it stands for, whose rounding errors are those of grad - delta.
// So a token that has all the weight gets exactly no gradient.
template <class T>
void add_key_softmax_delta(std::int64_t tokens, std::int64_t width, const T* s, const T* grad, T* delta) {
  for (std::int64_t c = 0; c < width; c += kWidth<T>) {
    Vector<T> sum = load(delta + c);
    for (std::int64_t i = 0; i < tokens; ++i) sum += load(s + i * width + c) * load(grad + i * width + c);
    store(delta + c, sum);
  }
}

template <class T>
void key_softmax_delta_of_block(std::int64_t tokens, std::int64_t width, const T* s, const T* grad, T* delta) {
  fill(delta, width, T(0));
  add_key_softmax_delta(tokens, width, s, grad, delta);
}

// grad of the key softmax (in place): s * (grad - delta). Where one token has all the weight its delta is its own grad,
// and the difference exactly zero, which the closed form would miss by a rounding error.
template <class T>
void key_softmax_backward(std::int64_t tokens, std::int64_t width, const T* s, const T* delta, T* grad) {
  for (std::int64_t c = 0; c < width; c += kWidth<T>) {
    const Vector<T> d = load(delta + c);
    for (std::int64_t i = 0; i < tokens; ++i) {
      const Vector<T> weight = load(s + i * width + c), g = load(grad + i * width + c);
      store(grad + i * width + c, weight * (g - (weight == T(1) ? g : d)));
    }
  }
}

// Combines the sums of all chunks for key `row`: max, sum, and out [leading] = softmax-weighted mean of the values.
// A feature whose tokens are all masked has sum 0 and mean 0; `kept`, whether any token is, tells it from a sum that is
// 0 because every logit is -infinity, which softmax makes NaN.
template <class T>
void combine_keys(const T* chunks, std::int64_t count, std::int64_t keys, std::int64_t row, std::int64_t leading,
                  bool kept, T* max, T* sum, T* out) {
  const std::int64_t stride = KeySums<T>::size(keys, leading);
  double factors[64];  // split_tokens makes at most 64 chunks
  T largest = -kInfinity<T>;
  for (std::int64_t p = 0; p < count; ++p) largest = max_of(chunks[p * stride + row], largest);
  const T shift = largest == -kInfinity<T> ? T(0) : largest;
  double total = 0;
  for (std::int64_t p = 0; p < count; ++p) {
    factors[p] = __builtin_exp(static_cast<double>(chunks[p * stride + row] - shift));
    total += factors[p] * static_cast<double>(chunks[p * stride + padded<T>(keys) + row]);
  }
  if (kept && total == 0) total = __builtin_nan("");
  *max = largest;
  *sum = static_cast<T>(total);
  for (std::int64_t p = 0; p < count; ++p) factors[p] = total == 0 ? 0.0 : factors[p] / total;
  combine_partials(chunks + 2 * padded<T>(keys) + row * leading, factors, count, stride, leading, out);
}

// rows of masked tokens: logits become masked_logit, values (unless null) 0
template <class T>
void apply_mask(const Mask& mask, std::int64_t batch, std::int64_t token, std::int64_t tokens, T masked_logit,
                T* logits, std::int64_t logits_width, T* values, std::int64_t values_width) {
  if (!mask.data) return;
  for (std::int64_t i = 0; i < tokens; ++i) {
    if (mask.data[batch * mask.batch_stride + (token + i) * mask.token_stride]) continue;
    fill(logits + i * logits_width, logits_width, masked_logit);
    if (values) fill(values + i * values_width, values_width, T(0));
  }
}

inline std::int64_t count_kept(const Mask& mask, std::int64_t batch, std::int64_t tokens) {
  if (!mask.data) return tokens;
  std::int64_t kept = 0;
  for (std::int64_t i = 0; i < tokens; ++i) kept += mask.data[batch * mask.batch_stride + i * mask.token_stride] != 0;
  return kept;
}

}  // namespace msformer::MSFORMER_VARIANT
