// One call of efficient attention: sizes, factors, and loops over pairs of an image and a head, in blocks of tokens.
#pragma once

#include "softmax.h"

namespace msformer::MSFORMER_VARIANT {

// Keys and values that a block is of: those of the images, or those of the memory.
struct KeyTensors {
  Activation key, value, grad_key, grad_value;
  Mask mask;
  std::int64_t tokens;
};

// Of one pair, in scratch memory: the context [keys, value_width], then the sum of the keys [key_width] that ReLU
// attention divides by. Padding is zero. Gradients of both lie in the same way.
template <class E>
struct Problem {
  using T = typename E::Value;
  const AttentionArguments& a;
  const E engine;
  const std::int64_t pairs = a.batch * a.heads;
  const std::int64_t keys = a.key_channels, values = a.value_channels;
  const std::int64_t key_width = padded<T>(keys), value_width = padded<T>(values);
  const Split key_split = split_tokens(a.key_tokens, pairs), query_split = split_tokens(a.query_tokens, pairs);

  Problem(const AttentionArguments& arguments, const E& engine_) : a(arguments), engine(engine_) {}

  bool softmax() const { return a.normalization == Normalization::softmax; }
  bool relu() const { return a.normalization == Normalization::relu; }
  bool query_softmax() const { return softmax() && a.normalize_query; }
  bool divides() const { return relu() && a.normalize_query; }

  KeyTensors of_images() const { return {a.key, a.value, a.grad_key, a.grad_value, a.mask, a.key_tokens}; }
  KeyTensors of_memory() const {
    return {a.memory_key, a.memory_value, a.grad_memory_key, a.grad_memory_value, {}, a.memory_tokens};
  }
  bool is_all(std::int64_t tokens) const { return tokens == a.key_tokens + a.memory_tokens; }
  std::int64_t kept_tokens(std::int64_t batch) const {
    return count_kept(a.mask, batch, a.key_tokens) + a.memory_tokens;
  }

  std::int64_t key_sum_at() const { return keys * value_width; }
  std::int64_t context_size() const { return keys * value_width + key_width; }

  // factors before the normalisation; with "scaling", the normalisation itself
  T key_factor(std::int64_t batch) const { return static_cast<T>(a.key_scale) * length_scale(batch); }
  T query_factor(std::int64_t batch) const {
    return static_cast<T>(a.query_scale) * (a.normalize_query ? length_scale(batch) : T(1));
  }
  T masked_logit() const { return softmax() ? -kInfinity<T> : T(0); }

  // calls block(blocks, chunk, batch, head, first token, tokens) for all tokens, and begin(blocks, chunk, batch, head)
  // before the first of a chunk, in parallel over pairs and chunks
  template <class Blocks, class Begin, class Block>
  void for_chunks(const Split& split, std::int64_t tokens, const Begin& begin, const Block& block) const {
    Arena counter(nullptr);
    Blocks measure(counter, *this);
    parallel_for(pairs * split.count, a.num_threads, counter.used(), [&](std::int64_t i, void* memory) {
      Arena arena(memory);
      Blocks blocks(arena, *this);
      const std::int64_t batch = i / split.count / a.heads, head = i / split.count % a.heads;
      const std::int64_t first = i % split.count * split.size, last = min_of(tokens, first + split.size);
      begin(blocks, i, batch, head);
      const auto task = [&](std::int64_t token, std::int64_t count) { block(blocks, i, batch, head, token, count); };
      for_blocks_of(first, last, task, Blocks::kTokens);
    });
  }

  // calls task(pair, first row, last row) for blocks of rows of the contexts, in parallel
  template <class Task>
  void for_row_blocks(const Task& task) const {
    constexpr std::int64_t kRows = 48;
    const std::int64_t blocks = (keys + kRows - 1) / kRows;
    parallel_for(pairs * blocks, a.num_threads, 0, [&](std::int64_t i, void*) {
      task(i / blocks, i % blocks * kRows, min_of(keys, (i % blocks + 1) * kRows));
    });
  }

 private:
  T length_scale(std::int64_t batch) const {
    if (a.normalization != Normalization::scaling) return T(1);
    const std::int64_t kept = kept_tokens(batch);
    return kept ? static_cast<T>(1.0 / __builtin_sqrt(static_cast<double>(kept))) : T(0);
  }
};

// phi of ReLU attention; NaN stays NaN
template <class T>
inline void relu_rows(T* x, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i += kWidth<T>) {
    const Vector<T> v = load(x + i);
    store(x + i, v < T(0) ? Vector<T>{} : v);
  }
}

// its gradient (in place), from what it made, times scale
template <class T>
inline void relu_rows_backward(const T* phi, T* grad, std::int64_t count, T scale) {
  for (std::int64_t i = 0; i < count; i += kWidth<T>)
    store(grad + i, load(phi + i) <= T(0) ? Vector<T>{} : load(grad + i) * scale);
}

template <class T>
inline T dot_rows(const T* a, const T* b, std::int64_t count) {
  Vector<T> sum{};
  for (std::int64_t i = 0; i < count; i += kWidth<T>) sum += load(a + i) * load(b + i);
  return horizontal_sum<T>(sum);
}

// out += factor * x
template <class T>
inline void add_scaled(T factor, const T* x, std::int64_t count, T* out) {
  for (std::int64_t i = 0; i < count; i += kWidth<T>) store(out + i, load(out + i) + load(x + i) * factor);
}

// Rows of a key's statistics that its gradient needs, each key_width long.
template <class T>
struct KeyStatistics {
  T *max, *inverse_sum, *delta;
  KeyStatistics(T* memory, std::int64_t key_width)
      : max(memory), inverse_sum(memory + key_width), delta(memory + 2 * key_width) {}
};

}  // namespace msformer::MSFORMER_VARIANT
