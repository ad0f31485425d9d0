// The folded form of efficient self-attention, what forward and backward share: sizes, weights as the products want
// them, and the way of a block of tokens into scratch.
//
// Queries are kept with every head's features padded to whole vectors (query_width = heads * head_width), so that the
// softmax of a head works on aligned vectors; the padding holds -infinity before the softmax and 0 after it.
#pragma once

#include "../attention/softmax.h"
#include "../base/norm.h"
#include "self_attention.h"

namespace msformer::MSFORMER_VARIANT {

// out [rows, padded(columns)] = source [rows, columns], zero padding
template <class T>
inline void stage(T* out, const T* source, std::int64_t rows, std::int64_t columns) {
  for (std::int64_t i = 0; i < rows; ++i) copy_padded(out + i * padded<T>(columns), source + i * columns, columns);
}

// The products of a block of tokens, for the choice of the engine.
struct FoldedProducts {
  ProductShape shapes[3];
  explicit FoldedProducts(const SelfAttentionArguments& a) {
    const std::int64_t tokens = min_of(a.tokens, kBlockTokens);
    shapes[0] = {tokens, a.channels, a.key_channels, false};
    shapes[1] = {tokens, a.key_channels, a.channels, false};
    shapes[2] = {a.key_channels, tokens, a.channels, true};
  }
};

template <class E>
struct SelfAttention {
  using T = typename E::Value;
  using Element = typename E::Element;
  const SelfAttentionArguments& a;
  const E engine;
  const std::int64_t channels = a.channels, keys = a.key_channels, values = a.value_channels, heads = a.heads;
  const std::int64_t head_keys = keys / heads, head_values = values / heads;
  const std::int64_t width = padded<T>(channels), key_width = padded<T>(keys);
  const std::int64_t head_width = padded<T>(head_keys), query_width = heads * head_width;
  const std::int64_t query_rows =
      heads == 1 ? keys : query_width;  // with one head all padding comes last, and can be left out
  const std::int64_t head_value_width = padded<T>(head_values);
  const Split split = split_tokens(a.tokens, a.batch);

  static constexpr std::int64_t kRowBlock = 48;  // rows of one task in the small products
  const std::int64_t row_blocks = (head_keys + kRowBlock - 1) / kRowBlock;

  SelfAttention(const SelfAttentionArguments& arguments, const E& engine_) : a(arguments), engine(engine_) {}

  const T* parameter(const void* p) const { return static_cast<const T*>(p); }
  std::int64_t chunks() const { return a.batch * split.count; }
  std::int64_t query_row(std::int64_t key_row) const {  // row of the padded query layout
    return key_row / head_keys * head_width + key_row % head_keys;
  }
  bool any_kept(std::int64_t batch) const { return count_kept(a.mask, batch, a.tokens) > 0; }

  struct Weights {
    Element *query, *key;      // packed [C, query_width], [C, key_width]
    T* query_bias;             // [query_width]
    T *query_rows, *key_rows;  // the same as rows [query_width, width], [keys, width]
    T *norm_weight, *norm_bias;
    Norm<T> norm;

    Weights(Arena& arena, const SelfAttention& s)
        : query(arena.take<Element>(s.engine.packed_size(s.channels, s.query_width))),
          key(arena.take<Element>(s.engine.packed_size(s.channels, s.key_width))),
          query_bias(arena.take<T>(s.query_width)),
          query_rows(arena.take<T>(s.query_width * s.width)),
          key_rows(arena.take<T>(s.keys * s.width)),
          norm_weight(arena.take<T>(s.width)),
          norm_bias(arena.take<T>(s.width)) {}

    void fill_in(const SelfAttention& s) {
      fill(query_rows, s.query_width * s.width, T(0));
      fill(query_bias, s.query_width, -kInfinity<T>);
      for (std::int64_t row = 0; row < s.keys; ++row) {
        copy_padded(query_rows + s.query_row(row) * s.width,
                    s.parameter(s.a.parameters.query_weight) + row * s.channels, s.channels);
        query_bias[s.query_row(row)] = s.a.parameters.query_bias ? s.parameter(s.a.parameters.query_bias)[row] : T(0);
      }
      stage(key_rows, s.parameter(s.a.parameters.key_weight), s.keys, s.channels);
      pack(s.engine, s.a.num_threads, query, query_rows, 1, s.width, s.channels, s.query_width);
      pack(s.engine, s.a.num_threads, key, key_rows, 1, s.width, s.channels, s.keys);
      if (!s.a.parameters.norm.weight) return;
      norm = {copy_padded(norm_weight, s.a.parameters.norm.weight, s.channels),
              copy_padded(norm_bias, s.a.parameters.norm.bias, s.channels), static_cast<T>(s.a.norm_eps),
              s.a.norm_centred};
    }
  };

  // tokens of one block: x after the norm; normalized and rstd (may be null) are kept for the gradient of the norm
  void load_x(const Norm<T>& norm, std::int64_t batch, std::int64_t token, std::int64_t tokens, T* x, T* normalized,
              T* rstd) const {
    load_tokens(a.x, batch, 0, token, tokens, channels, x, width);
    if (norm.weight) layer_norm(norm, tokens, channels, x, normalized ? normalized : x, x, width, rstd);
  }

  void load_queries(const Weights& w, std::int64_t tokens, const T* x, T* queries) const {
    multiply(engine, tokens, channels, query_width, x, width, w.query, queries, query_width, w.query_bias);
    softmax_rows(queries, tokens, heads, head_width);
  }

  // rows [images, k rows of width] -> packed as the right-hand side of products with k rows each
  void pack_rows(Element* packed, const T* rows, std::int64_t images, std::int64_t k, std::int64_t stride) const {
    parallel_for(images, a.num_threads, 0, [&](std::int64_t n, void*) {
      pack(engine, a.num_threads, packed + n * engine.packed_size(k, width), rows + n * stride, width, 1, k, channels);
    });
  }

  // calls task(batch, head, first row, rows) for blocks of rows of the Dk x ... matrices, in parallel
  template <class Task>
  void for_row_blocks(const Task& task) const {
    parallel_for(a.batch * heads * row_blocks, a.num_threads, 64, [&](std::int64_t i, void*) {
      const std::int64_t batch = i / (heads * row_blocks), head = i / row_blocks % heads;
      const std::int64_t first = i % row_blocks * kRowBlock;
      task(batch, head, head * head_keys + first, min_of(kRowBlock, head_keys - first));
    });
  }

  // calls task(batch, first token, tokens) for the blocks of one chunk
  template <class Task>
  void for_blocks(std::int64_t chunk, const Task& task) const {
    const std::int64_t first = chunk % split.count * split.size, last = min_of(a.tokens, first + split.size);
    for_blocks_of(first, last,
                  [&](std::int64_t token, std::int64_t tokens) { task(chunk / split.count, token, tokens); });
  }

  // folded [B, query_width, width] = context W_o, one row a key feature, from context [B, keys, head_value_width]
  void fold(const T* context, T* folded) const {
    const std::int64_t packed = head_values * width;
    Workspace memory(sizeof(T) * static_cast<std::size_t>(heads * packed));
    T* output_weight = static_cast<T*>(memory.data());
    for (std::int64_t head = 0; head < heads; ++head)
      pack(Values<T>(), a.num_threads, output_weight + head * packed,
           parameter(a.parameters.output_weight) + head * head_values, 1, values, head_values, channels);
    fill(folded, a.batch * query_width * width, T(0));
    for_row_blocks([&](std::int64_t batch, std::int64_t head, std::int64_t row, std::int64_t rows) {
      multiply(Values<T>(), rows, head_values, width, context + (batch * keys + row) * head_value_width,
               head_value_width, output_weight + head * packed, folded + (batch * query_width + query_row(row)) * width,
               width);
    });
  }
};

}  // namespace msformer::MSFORMER_VARIANT
