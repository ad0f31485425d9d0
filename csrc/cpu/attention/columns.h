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

template <class E>
class Columns {
  using T = typename E::Value;
  using Element = typename E::Element;

 public:
  static constexpr std::int64_t kTokens = 128;  // of a block; longer rows spend less on the sums at their ends

  Columns(Arena& arena, const Problem<E>& problem)
      : p_(problem),
        keys_(arena.take<T>(kTokens * p_.keys)),
        values_(arena.take<T>(kTokens * p_.values)),
        grad_keys_(arena.take<T>(kTokens * p_.keys)),
        grad_values_(arena.take<T>(kTokens * p_.values)),
        rows_(arena.take<T>(kTokens * p_.value_width)),
        factors_(arena.take<T>(kTokens)),
        totals_(arena.take<T>(kTokens)) {}

  // see Rows
  void add_keys(const KeyTensors& from, std::int64_t batch, std::int64_t head, std::int64_t token, std::int64_t tokens,
                KeySums<T> sums) {
    const std::int64_t width = padded<T>(tokens);
    load_keys(from, batch, head, token, tokens);
    load_tokens(from.value, batch, head, token, tokens, p_.values, rows_, p_.value_width);
    for_masked(from.mask, batch, token, tokens,
               [&](std::int64_t i) { fill(rows_ + i * p_.value_width, p_.value_width, T(0)); });
    ask_for(from.key, batch, head, token + tokens, from.tokens, p_.keys);
    ask_for(from.value, batch, head, token + tokens, from.tokens, p_.values);
    if (p_.softmax()) weigh_keys(tokens, sums);
    if (p_.relu())
      for (std::int64_t c = 0; c < p_.keys; ++c) sums.sum[c] += sum_of(keys_ + c * width, width);
    gemm<Values<T>>(p_.keys, tokens, p_.value_width, {keys_, width, 1}, {rows_, p_.value_width}, Start::output, nullptr,
                    {sums.values, p_.value_width});
  }

  void write_output(std::int64_t batch, std::int64_t head, std::int64_t token, std::int64_t tokens, const T* context,
                    const Element*) {
    const std::int64_t width = padded<T>(tokens);
    load_queries(batch, head, token, tokens, context);
    ask_for(p_.a.query, batch, head, token + tokens, p_.a.query_tokens, p_.keys);
    ask_for(p_.a.output, batch, head, token, p_.a.query_tokens, p_.values);
    gemm<Values<T>>(p_.values, p_.keys, width, {context, 1, p_.value_width}, {keys_, width}, Start::zero, nullptr,
                    {values_, width});
    scale_columns(values_, p_.values, width, static_cast<T>(p_.a.output_scale));
    store(p_.a.output, batch, head, token, tokens, p_.values, values_);
  }

  void write_query_gradient(std::int64_t batch, std::int64_t head, std::int64_t token, std::int64_t tokens,
                            const T* context, const Element*, T* grad_context) {
    const std::int64_t width = padded<T>(tokens);
    load_queries(batch, head, token, tokens, context);
    scale_columns(keys_, p_.keys, width, T(1));
    ask_for(p_.a.query, batch, head, token + tokens, p_.a.query_tokens, p_.keys);
    ask_for(p_.a.grad_output, batch, head, token + tokens, p_.a.query_tokens, p_.values);
    ask_for(p_.a.grad_query, batch, head, token, p_.a.query_tokens, p_.keys);
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

  void write_key_gradient(const KeyTensors& from, std::int64_t batch, std::int64_t head, std::int64_t token,
                          std::int64_t tokens, const T* grad_context, const Element*, const Element*,
                          KeyStatistics<T> statistics) {
    const std::int64_t width = padded<T>(tokens);
    weigh(from, batch, head, token, tokens, grad_context, statistics);
    ask_for(from.key, batch, head, token + tokens, from.tokens, p_.keys);
    ask_for(from.value, batch, head, token + tokens, from.tokens, p_.values);
    ask_for(from.grad_key, batch, head, token, from.tokens, p_.keys);
    ask_for(from.grad_value, batch, head, token, from.tokens, p_.values);
    gemm<Values<T>>(p_.values, p_.keys, width, {grad_context, 1, p_.value_width}, {keys_, width}, Start::zero, nullptr,
                    {grad_values_, width});
    mask_columns(from.mask, batch, token, tokens, T(0), grad_values_, p_.values);
    store(from.grad_value, batch, head, token, tokens, p_.values, grad_values_);
    const T scale = p_.key_factor(batch), *grad_sum = grad_context + p_.key_sum_at();
    for (std::int64_t c = 0; c < p_.keys; ++c) {
      const T* weights = keys_ + c * width;
      T* grad = grad_keys_ + c * width;
      if (p_.softmax()) {
        const T delta = p_.is_all(tokens) ? dot_rows(weights, grad, width) : statistics.delta[c];
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
    mask_columns(from.mask, batch, token, tokens, T(0), grad_keys_, p_.keys);
    store(from.grad_key, batch, head, token, tokens, p_.keys, grad_keys_);
  }

  // see Rows
  void add_delta(const KeyTensors& from, std::int64_t batch, std::int64_t head, std::int64_t token, std::int64_t tokens,
                 const T* grad_context, const Element*, KeyStatistics<T> statistics) {
    const std::int64_t width = padded<T>(tokens);
    weigh(from, batch, head, token, tokens, grad_context, statistics);
    for (std::int64_t c = 0; c < p_.keys; ++c)
      statistics.delta[c] += dot_rows(keys_ + c * width, grad_keys_ + c * width, width);
  }

 private:
  void weigh(const KeyTensors& from, std::int64_t batch, std::int64_t head, std::int64_t token, std::int64_t tokens,
             const T* grad_context, KeyStatistics<T> statistics) {
    const std::int64_t width = padded<T>(tokens);
    load_keys(from, batch, head, token, tokens);
    load(from.value, batch, head, token, tokens, p_.values, values_);
    mask_columns(from.mask, batch, token, tokens, T(0), values_, p_.values);
    if (p_.softmax())
      for (std::int64_t c = 0; c < p_.keys; ++c)
        weights_of(keys_ + c * width, width, statistics.max[c], statistics.inverse_sum[c]);
    gemm<Values<T>>(p_.keys, p_.values, width, {grad_context, p_.value_width, 1}, {values_, width}, Start::zero,
                    nullptr, {grad_keys_, width});
  }

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

  // Asks for the next block of a tensor while this one is worked on: rows are too short for the processor to see them
  // coming, and in images of 32 x 32 lie a page apart.
  void ask_for(const Activation& x, std::int64_t batch, std::int64_t head, std::int64_t token, std::int64_t last,
               std::int64_t channels) const {
    if (token >= last) return;
    visit_elements(x, batch, head, token, [&](auto* element) {
      constexpr std::int64_t kLine = 64 / static_cast<std::int64_t>(sizeof(*element));
      const std::int64_t count = min_of(last - token, kTokens);
      for (std::int64_t c = 0; c < channels; ++c)
        for (std::int64_t i = 0; i < count; i += kLine) __builtin_prefetch(element + c * x.channel_stride + i, 0, 2);
    });
  }

  // join(term(0), term(1), ...), four at a time: a single chain would wait for each result
  template <class Term, class Join>
  static Vector<T> joined(std::int64_t count, Vector<T> neutral, const Term& term, const Join& join) {
    Vector<T> found[4] = {neutral, neutral, neutral, neutral};
    std::int64_t i = 0;
    for (; i + 4 <= count; i += 4)
      for (int k = 0; k < 4; ++k) found[k] = join(found[k], term(i + k));
    for (; i < count; ++i) found[0] = join(found[0], term(i));
    return join(join(found[0], found[1]), join(found[2], found[3]));
  }

  template <class Term>
  static Vector<T> sum_over(std::int64_t count, const Term& term) {
    return joined(count, Vector<T>{}, term, [](Vector<T> a, Vector<T> b) { return a + b; });
  }

  template <class Task>
  static void for_masked(const Mask& mask, std::int64_t batch, std::int64_t token, std::int64_t tokens,
                         const Task& task) {
    if (!mask.data) return;
    for (std::int64_t i = 0; i < tokens; ++i)
      if (!mask.data[batch * mask.batch_stride + (token + i) * mask.token_stride]) task(i);
  }

  static void mask_columns(const Mask& mask, std::int64_t batch, std::int64_t token, std::int64_t tokens, T value, T* x,
                           std::int64_t channels) {
    const std::int64_t width = padded<T>(tokens);
    for_masked(mask, batch, token, tokens, [&](std::int64_t i) {
      for (std::int64_t c = 0; c < channels; ++c) x[c * width + i] = value;
    });
  }

  // scaled keys, or phi of them; what is masked or padding weighs nothing
  void load_keys(const KeyTensors& from, std::int64_t batch, std::int64_t head, std::int64_t token,
                 std::int64_t tokens) {
    const std::int64_t width = padded<T>(tokens);
    load(from.key, batch, head, token, tokens, p_.keys, keys_);
    scale_rows(keys_, p_.keys * width, p_.key_factor(batch));
    if (p_.relu()) relu_rows(keys_, p_.keys * width);
    mask_columns(from.mask, batch, token, tokens, p_.masked_logit(), keys_, p_.keys);
    if (p_.softmax()) set_padding(keys_, p_.keys, tokens, width, -kInfinity<T>);
  }

  // x becomes exp(x - max) * factor; its sum
  static T weights_of(T* x, std::int64_t width, T max, T factor) {
    const T shift = max == -kInfinity<T> ? T(0) : max;
    Vector<T> sum{};
    for (std::int64_t i = 0; i < width; i += kWidth<T>) {
      const Vector<T> weight = vexp_small(load(x + i) - shift) * factor;
      store(x + i, weight);
      sum += weight;
    }
    return horizontal_sum<T>(sum);
  }

  static T sum_of(const T* x, std::int64_t count) {
    Vector<T> sum{};
    for (std::int64_t i = 0; i < count; i += kWidth<T>) sum += load(x + i);
    return horizontal_sum<T>(sum);
  }

  // Keys become exp(key - max); sums of earlier blocks are brought to the new maxima. All maxima come first: a row that
  // waited for its own would leave the multipliers idle.
  void weigh_keys(std::int64_t tokens, KeySums<T> sums) {
    const std::int64_t width = padded<T>(tokens);
    for (std::int64_t c = 0; c < p_.keys; ++c) {
      const T *row = keys_ + c * width, before = sums.max[c];
      const T max = horizontal_max<T>(
          joined(width / kWidth<T>, splat(before), [&](std::int64_t i) { return load(row + i * kWidth<T>); }, vmax<T>));
      if (max == before) continue;
      const T rescale = vexp_small(splat(before - max))[0];
      sums.max[c] = max;
      sums.sum[c] *= rescale;
      scale_rows(sums.values + c * p_.value_width, p_.value_width, rescale);
    }
    for (std::int64_t c = 0; c < p_.keys; ++c) sums.sum[c] += weights_of(keys_ + c * width, width, sums.max[c], T(1));
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
    const Vector<T> largest =
        joined(p_.keys, load(queries), [&](std::int64_t c) { return load(queries + c * width); }, vmax<T>);
    Vector<T> sum{};
    for (std::int64_t c = 0; c < p_.keys; ++c) {
      const Vector<T> e = vexp_small(load(queries + c * width) - largest);
      store(queries + c * width, e);
      sum += e;
    }
    return sum;
  }

  // of a vector of queries and one row
  Vector<T> product(const T* queries, std::int64_t width, const T* row) const {
    return sum_over(p_.keys, [&](std::int64_t c) { return load(queries + c * width) * row[c]; });
  }

  // every column times its factor
  void scale_columns(T* x, std::int64_t rows, std::int64_t width, T scale) const {
    for (std::int64_t c = 0; c < rows; ++c)
      for (std::int64_t i = 0; i < width; i += kWidth<T>)
        store(x + c * width + i, load(x + c * width + i) * (load(factors_ + i) * scale));
  }

  // <weights, their gradient> of a vector of queries
  Vector<T> weighted_gradient(std::int64_t i, std::int64_t width) const {
    return sum_over(p_.keys,
                    [&](std::int64_t c) { return load(keys_ + c * width + i) * load(grad_keys_ + c * width + i); });
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

  const Problem<E>& p_;
  T *keys_, *values_, *grad_keys_, *grad_values_, *rows_, *factors_, *totals_;
};

}  // namespace msformer::MSFORMER_VARIANT
