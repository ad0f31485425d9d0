// Blocks of features whose tokens lie side by side, [features, tokens], as in images with channels first. Softmaxes of
// queries take a vector of tokens at a time, and a product over features reads what it is of in place; only values and
// the gradient of the output change places of tokens and features, for the sums over tokens.
#pragma once

#include "problem.h"

namespace msformer::MSFORMER_VARIANT {

inline bool is_by_columns(const Activation& x) { return x.token_stride == 1 && x.channel_stride != 1; }

// the tensor from one token on, with tokens and channels in each other's place
inline Activation turned(const Activation& x, std::int64_t token) {
  Activation out = x;
  visit_elements(x, 0, 0, token, [&](auto* element) { out.data = element; });
  out.token_stride = x.channel_stride;
  out.channel_stride = x.token_stride;
  return out;
}

template <class T>
class Columns {
 public:
  Columns(Arena& arena, const Problem<T>& problem)
      : p_(problem),
        keys_(arena.take<T>(kBlockTokens * p_.keys)),
        values_(arena.take<T>(kBlockTokens * p_.values)),
        grad_keys_(arena.take<T>(kBlockTokens * p_.keys)),
        grad_values_(arena.take<T>(kBlockTokens * p_.values)),
        rows_(arena.take<T>(kBlockTokens * p_.value_width)),
        factors_(arena.take<T>(kBlockTokens)),
        totals_(arena.take<T>(kBlockTokens)) {}

  // see Rows
  void add_keys(std::int64_t batch, std::int64_t head, std::int64_t token, std::int64_t tokens, KeySums<T> sums) {
    const std::int64_t width = padded<T>(tokens);
    load_keys(batch, head, token, tokens);
    load_tokens(p_.a.value, batch, head, token, tokens, p_.values, rows_, p_.value_width);
    for_masked(batch, token, tokens, [&](std::int64_t i) { fill(rows_ + i * p_.value_width, p_.value_width, T(0)); });
    if (p_.softmax()) weigh_keys(tokens, sums);
    if (p_.relu())
      for (std::int64_t c = 0; c < p_.keys; ++c) sums.sum[c] += sum_of(keys_ + c * width, width);
    gemm<Values<T>>(p_.keys, tokens, p_.value_width, {keys_, width, 1}, {rows_, p_.value_width}, Start::output, nullptr,
                    {sums.values, p_.value_width});
  }

  void write_output(std::int64_t batch, std::int64_t head, std::int64_t token, std::int64_t tokens, const T* context) {
    const std::int64_t width = padded<T>(tokens);
    load_queries(batch, head, token, tokens, context);
    gemm<Values<T>>(p_.values, p_.keys, width, {context, 1, p_.value_width}, {keys_, width}, Start::zero, nullptr,
                    {values_, width});
    scale_columns(values_, p_.values, width, static_cast<T>(p_.a.output_scale));
    store(p_.a.output, batch, head, token, tokens, p_.values, values_);
  }

  void write_query_gradient(std::int64_t batch, std::int64_t head, std::int64_t token, std::int64_t tokens,
                            const T* context, const T*, T* grad_context) {
    const std::int64_t width = padded<T>(tokens);
    load_queries(batch, head, token, tokens, context);
    scale_columns(keys_, p_.keys, width, T(1));
    load_tokens(p_.a.grad_output, batch, head, token, tokens, p_.values, rows_, p_.value_width);
    gemm<Values<T>>(p_.keys, tokens, p_.value_width, {keys_, width, 1}, {rows_, p_.value_width}, Start::output, nullptr,
                    {grad_context, p_.value_width});
    load(p_.a.grad_output, batch, head, token, tokens, p_.values, grad_values_);
    gemm<Values<T>>(p_.keys, p_.values, width, {context, p_.value_width, 1}, {grad_values_, width}, Start::zero,
                    nullptr, {grad_keys_, width});
    const T scale = p_.query_factor(batch) * static_cast<T>(p_.a.output_scale);
    if (p_.query_softmax()) {
      softmax_backward(width, scale);
    } else {
      if (p_.divides()) divide_backward(width, context + p_.key_sum_at(), grad_context + p_.key_sum_at());
      if (p_.relu())
        relu_rows_backward(keys_, grad_keys_, p_.keys * width, scale);
      else
        scale_rows(grad_keys_, p_.keys * width, scale);
    }
    store(p_.a.grad_query, batch, head, token, tokens, p_.keys, grad_keys_);
  }

  void write_key_gradient(std::int64_t batch, std::int64_t head, std::int64_t token, std::int64_t tokens,
                          const T* grad_context, const T*, KeyStatistics<T> statistics) {
    const std::int64_t width = padded<T>(tokens);
    load_keys(batch, head, token, tokens);
    load(p_.a.value, batch, head, token, tokens, p_.values, values_);
    for_masked(batch, token, tokens, [&](std::int64_t i) {
      for (std::int64_t c = 0; c < p_.values; ++c) values_[c * width + i] = T(0);
    });
    if (p_.softmax())
      for (std::int64_t c = 0; c < p_.keys; ++c)
        weights_of(keys_ + c * width, width, statistics.max[c], statistics.inverse_sum[c]);
    gemm<Values<T>>(p_.values, p_.keys, width, {grad_context, 1, p_.value_width}, {keys_, width}, Start::zero, nullptr,
                    {grad_values_, width});
    store(p_.a.grad_value, batch, head, token, tokens, p_.values, grad_values_);
    gemm<Values<T>>(p_.keys, p_.values, width, {grad_context, p_.value_width, 1}, {values_, width}, Start::zero,
                    nullptr, {grad_keys_, width});
    const T scale = p_.key_factor(batch), *grad_sum = grad_context + p_.key_sum_at();
    for (std::int64_t c = 0; c < p_.keys; ++c) {
      const T* weights = keys_ + c * width;
      T* grad = grad_keys_ + c * width;
      if (p_.softmax()) {
        const T delta = tokens == p_.a.key_tokens ? dot_rows(weights, grad, width) : statistics.delta[c];
        for (std::int64_t i = 0; i < width; i += kWidth<T>) {
          const Vector<T> weight = load(weights + i), g = load(grad + i);
          store(grad + i, weight * (g - (weight == T(1) ? g : splat(delta))) * scale);
        }
      } else if (p_.relu()) {
        if (p_.divides())
          for (std::int64_t i = 0; i < width; i += kWidth<T>) store(grad + i, load(grad + i) + grad_sum[c]);
        relu_rows_backward(weights, grad, width, scale);
      } else {
        scale_rows(grad, width, scale);
      }
    }
    mask_columns(batch, token, tokens, T(0), grad_keys_);
    store(p_.a.grad_key, batch, head, token, tokens, p_.keys, grad_keys_);
  }

 private:
  static Vector<T> load(const T* at) { return MSFORMER_VARIANT::load(at); }
  static void store(T* at, Vector<T> x) { MSFORMER_VARIANT::store(at, x); }

  // channels of a block -> out [channels, padded(tokens)], padding zeroed
  static void load(const Activation& x, std::int64_t batch, std::int64_t head, std::int64_t token, std::int64_t tokens,
                   std::int64_t channels, T* out) {
    load_tokens(turned(x, token), batch, head, 0, channels, tokens, out, padded<T>(tokens));
  }
  static void store(const Activation& x, std::int64_t batch, std::int64_t head, std::int64_t token, std::int64_t tokens,
                    std::int64_t channels, const T* in) {
    store_tokens(turned(x, token), batch, head, 0, channels, tokens, in, padded<T>(tokens));
  }

  template <class Task>
  void for_masked(std::int64_t batch, std::int64_t token, std::int64_t tokens, const Task& task) const {
    const Mask& mask = p_.a.mask;
    if (!mask.data) return;
    for (std::int64_t i = 0; i < tokens; ++i)
      if (!mask.data[batch * mask.batch_stride + (token + i) * mask.token_stride]) task(i);
  }

  void mask_columns(std::int64_t batch, std::int64_t token, std::int64_t tokens, T value, T* x) const {
    const std::int64_t width = padded<T>(tokens);
    for_masked(batch, token, tokens, [&](std::int64_t i) {
      for (std::int64_t c = 0; c < p_.keys; ++c) x[c * width + i] = value;
    });
  }

  // scaled keys, or phi of them; what is masked or padding weighs nothing
  void load_keys(std::int64_t batch, std::int64_t head, std::int64_t token, std::int64_t tokens) {
    const std::int64_t width = padded<T>(tokens);
    load(p_.a.key, batch, head, token, tokens, p_.keys, keys_);
    scale_rows(keys_, p_.keys * width, p_.key_factor(batch));
    if (p_.relu()) relu_rows(keys_, p_.keys * width);
    mask_columns(batch, token, tokens, p_.masked_logit(), keys_);
    if (p_.softmax()) set_padding(keys_, p_.keys, tokens, width, -kInfinity<T>);
  }

  // x = exp(x - max) * factor
  static void weights_of(T* x, std::int64_t width, T max, T factor) {
    const T shift = max == -kInfinity<T> ? T(0) : max;
    for (std::int64_t i = 0; i < width; i += kWidth<T>) store(x + i, vexp_small(load(x + i) - shift) * factor);
  }

  static T sum_of(const T* x, std::int64_t count) {
    Vector<T> sum{};
    for (std::int64_t i = 0; i < count; i += kWidth<T>) sum += load(x + i);
    return horizontal_sum<T>(sum);
  }

  // keys become exp(key - max); sums of earlier blocks are brought to the new maxima
  void weigh_keys(std::int64_t tokens, KeySums<T> sums) {
    const std::int64_t width = padded<T>(tokens);
    for (std::int64_t c = 0; c < p_.keys; ++c) {
      T* row = keys_ + c * width;
      const T before = sums.max[c];
      Vector<T> largest = splat(before);
      for (std::int64_t i = 0; i < width; i += kWidth<T>) largest = vmax<T>(largest, load(row + i));
      const T max = horizontal_max<T>(largest);
      weights_of(row, width, max, T(1));
      if (max != before) {
        const T rescale = vexp_small(splat(before - max))[0];
        sums.max[c] = max;
        sums.sum[c] *= rescale;
        scale_rows(sums.values + c * p_.value_width, p_.value_width, rescale);
      }
      sums.sum[c] += sum_of(row, width);
    }
  }

  // queries before the division by what normalises them, of which 1 / is kept in factors_
  void load_queries(std::int64_t batch, std::int64_t head, std::int64_t token, std::int64_t tokens, const T* context) {
    const std::int64_t width = padded<T>(tokens);
    load(p_.a.query, batch, head, token, tokens, p_.keys, keys_);
    scale_rows(keys_, p_.keys * width, p_.query_factor(batch));
    if (p_.relu()) relu_rows(keys_, p_.keys * width);
    for (std::int64_t i = 0; i < width; i += kWidth<T>) {
      if (p_.query_softmax())
        store(factors_ + i, T(1) / weigh_queries(keys_ + i, width));
      else if (p_.divides())
        store(factors_ + i, T(1) / (product(keys_ + i, width, context + p_.key_sum_at()) + static_cast<T>(p_.a.eps)));
      else
        store(factors_ + i, splat(T(1)));
    }
  }

  // a vector of queries becomes exp(query - its maximum); their sum
  Vector<T> weigh_queries(T* queries, std::int64_t width) const {
    Vector<T> largest = load(queries), sum{};
    for (std::int64_t c = 1; c < p_.keys; ++c) largest = vmax<T>(largest, load(queries + c * width));
    for (std::int64_t c = 0; c < p_.keys; ++c) {
      const Vector<T> e = vexp_small(load(queries + c * width) - largest);
      store(queries + c * width, e);
      sum += e;
    }
    return sum;
  }

  // of a vector of queries and one row
  Vector<T> product(const T* queries, std::int64_t width, const T* row) const {
    Vector<T> sum{};
    for (std::int64_t c = 0; c < p_.keys; ++c) sum += load(queries + c * width) * row[c];
    return sum;
  }

  // every column times its factor
  void scale_columns(T* x, std::int64_t rows, std::int64_t width, T scale) const {
    for (std::int64_t c = 0; c < rows; ++c)
      for (std::int64_t i = 0; i < width; i += kWidth<T>)
        store(x + c * width + i, load(x + c * width + i) * (load(factors_ + i) * scale));
  }

  // <weights, their gradient> of a vector of queries
  Vector<T> weighted_gradient(std::int64_t i, std::int64_t width) const {
    Vector<T> sum{};
    for (std::int64_t c = 0; c < p_.keys; ++c) sum += load(keys_ + c * width + i) * load(grad_keys_ + c * width + i);
    return sum;
  }

  void softmax_backward(std::int64_t width, T scale) {
    for (std::int64_t i = 0; i < width; i += kWidth<T>) {
      const Vector<T> total = weighted_gradient(i, width);
      for (std::int64_t c = 0; c < p_.keys; ++c) {
        T* grad = grad_keys_ + c * width + i;
        store(grad, load(keys_ + c * width + i) * (load(grad) - total) * scale);
      }
    }
  }

  // see Rows
  void divide_backward(std::int64_t width, const T* key_sum, T* grad_sum) {
    for (std::int64_t i = 0; i < width; i += kWidth<T>) store(totals_ + i, weighted_gradient(i, width));
    for (std::int64_t c = 0; c < p_.keys; ++c) {
      T* grad = grad_keys_ + c * width;
      for (std::int64_t i = 0; i < width; i += kWidth<T>)
        store(grad + i, (load(grad + i) - load(totals_ + i) * key_sum[c]) * load(factors_ + i));
      grad_sum[c] -= dot_rows(totals_, keys_ + c * width, width);
    }
  }

  const Problem<T>& p_;
  T *keys_, *values_, *grad_keys_, *grad_values_, *rows_, *factors_, *totals_;
};

}  // namespace msformer::MSFORMER_VARIANT
