// Efficient attention on query, key, value (Shen et al., 2021): output = rho_q(Q) (rho_k(K)^T V), forward and backward.
//
// Forward: one pass over keys and values builds the context of every head, chunk by chunk with an online softmax; one
// pass over the queries writes the output. Backward: one pass over queries and grad_output builds the gradient of the
// context and writes that of the queries; one pass over keys and values writes theirs. Blocks of kBlockTokens tokens
// are held in scratch; the normalised queries and keys never reach memory.
#include "softmax.h"

namespace msformer::MSFORMER_VARIANT {
namespace {

template <class T>
struct Attention {
  const AttentionArguments& a;
  const std::int64_t pairs = a.batch * a.heads;  // (batch, head) pairs
  const std::int64_t keys = a.key_channels, values = a.value_channels;
  const std::int64_t key_width = padded<T>(keys), value_width = padded<T>(values);
  const Split key_split = split_tokens(a.key_tokens, pairs), query_split = split_tokens(a.query_tokens, pairs);

  explicit Attention(const AttentionArguments& arguments) : a(arguments) {}

  // factors before the normalisation; with "scaling", the normalisation itself
  T length_scale(std::int64_t batch) const {
    if (a.softmax) return T(1);
    const std::int64_t kept = count_kept(a.mask, batch, a.key_tokens);
    return kept ? static_cast<T>(1.0 / __builtin_sqrt(static_cast<double>(kept))) : T(0);
  }
  T key_factor(std::int64_t batch) const { return static_cast<T>(a.key_scale) * length_scale(batch); }
  T query_factor(std::int64_t batch) const {
    return static_cast<T>(a.query_scale) * (a.normalize_query ? length_scale(batch) : T(1));
  }
  bool query_softmax() const { return a.softmax && a.normalize_query; }

  // calls task(batch, head, first token, tokens, chunk index) in blocks, in parallel over pairs and chunks
  template <class Scratch, class Begin, class Block>
  void for_chunks(const Split& split, std::int64_t tokens, const Begin& begin, const Block& block) const {
    Arena counter(nullptr);
    Scratch measure(counter, *this);
    parallel_for(pairs * split.count, a.num_threads, counter.used(), [&](std::int64_t i, void* memory) {
      Arena arena(memory);
      Scratch scratch(arena, *this);
      const std::int64_t batch = i / split.count / a.heads, head = i / split.count % a.heads;
      const std::int64_t first = i % split.count * split.size, last = min_of(tokens, first + split.size);
      begin(scratch, i);
      for_blocks_of(first, last,
                    [&](std::int64_t token, std::int64_t count) { block(scratch, i, batch, head, token, count); });
    });
  }

  struct Blocks {
    T *keys, *values, *grad_keys, *grad_values;
    Blocks(Arena& arena, const Attention& at)
        : keys(arena.take<T>(kBlockTokens * at.key_width)),
          values(arena.take<T>(kBlockTokens * at.value_width)),
          grad_keys(arena.take<T>(kBlockTokens * at.key_width)),
          grad_values(arena.take<T>(kBlockTokens * at.value_width)) {}
  };

  void load_keys(std::int64_t batch, std::int64_t head, std::int64_t token, std::int64_t tokens, Blocks& s) const {
    load_tokens(a.key, batch, head, token, tokens, keys, s.keys, key_width);
    load_tokens(a.value, batch, head, token, tokens, values, s.values, value_width);
    scale_rows(s.keys, tokens * key_width, key_factor(batch));
    apply_mask(a.mask, batch, token, tokens, a.softmax ? -kInfinity<T> : T(0), s.keys, key_width, s.values,
               value_width);
  }

  void load_queries(std::int64_t batch, std::int64_t head, std::int64_t token, std::int64_t tokens, T* queries) const {
    load_tokens(a.query, batch, head, token, tokens, keys, queries, key_width);
    scale_rows(queries, tokens * key_width, query_factor(batch));
    if (!query_softmax()) return;
    set_padding(queries, tokens, keys, key_width, -kInfinity<T>);
    softmax_rows(queries, tokens, 1, key_width);
  }

  std::int64_t context_size() const { return keys * value_width; }

  // calls task(pair, first row, last row) for blocks of rows of the contexts, in parallel
  template <class Task>
  void for_row_blocks(const Task& task) const {
    constexpr std::int64_t kRows = 48;
    const std::int64_t blocks = (keys + kRows - 1) / kRows;
    parallel_for(pairs * blocks, a.num_threads, 0, [&](std::int64_t i, void*) {
      task(i / blocks, i % blocks * kRows, min_of(keys, (i % blocks + 1) * kRows));
    });
  }

  // context with padded rows, from the user's contiguous [B, H, Dk, Dv]
  void load_context(const void* source, T* out) const {
    for_row_blocks([&](std::int64_t pair, std::int64_t first, std::int64_t last) {
      for (std::int64_t row = pair * keys + first; row < pair * keys + last; ++row)
        copy_padded(out + row * value_width, static_cast<const T*>(source) + row * values, values);
    });
  }

  void build_context(T* context) const {
    const std::int64_t size = KeySums<T>::size(keys, value_width);
    Workspace partials(sizeof(T) * static_cast<std::size_t>(pairs * key_split.count * size));
    T* sums = static_cast<T*>(partials.data());
    for_chunks<Blocks>(
        key_split, a.key_tokens,
        [&](Blocks&, std::int64_t i) { reset(KeySums<T>(sums + i * size, keys), keys, value_width); },
        [&](Blocks& s, std::int64_t i, std::int64_t batch, std::int64_t head, std::int64_t token, std::int64_t tokens) {
          load_keys(batch, head, token, tokens, s);
          KeySums<T> chunk(sums + i * size, keys);
          if (a.softmax)
            accumulate_keys<Values<T>>(tokens, keys, s.keys, s.values, value_width, chunk);
          else
            multiply_transposed_add<Values<T>>(keys, tokens, value_width, s.keys, key_width, s.values, value_width,
                                               chunk.values, value_width);
        });
    for_row_blocks([&](std::int64_t pair, std::int64_t first, std::int64_t last) {
      const T* chunks = sums + pair * key_split.count * size;
      const bool kept = count_kept(a.mask, pair / a.heads, a.key_tokens) > 0;
      for (std::int64_t row = first; row < last; ++row) {
        T* max = static_cast<T*>(a.key_max) + pair * keys + row;
        T* sum = static_cast<T*>(a.key_sum) + pair * keys + row;
        T* out = context + (pair * keys + row) * value_width;
        if (a.softmax) {
          combine_keys(chunks, key_split.count, keys, row, value_width, kept, max, sum, out);
        } else {
          *max = T(0);
          *sum = T(1);
          combine_partials<T>(chunks + 2 * key_width + row * value_width, nullptr, key_split.count, size, value_width,
                              out);
        }
        std::memcpy(static_cast<T*>(a.context) + (pair * keys + row) * values, out,
                    sizeof(T) * static_cast<std::size_t>(values));
      }
    });
  }

  void forward() const {
    Workspace memory(sizeof(T) * static_cast<std::size_t>(pairs * context_size()));
    T* context = static_cast<T*>(memory.data());
    build_context(context);
    for_chunks<Blocks>(
        query_split, a.query_tokens, [](Blocks&, std::int64_t) {},
        [&](Blocks& s, std::int64_t, std::int64_t batch, std::int64_t head, std::int64_t token, std::int64_t tokens) {
          load_queries(batch, head, token, tokens, s.keys);
          const T* pair_context = context + (batch * a.heads + head) * context_size();
          multiply_rows(tokens, keys, value_width, s.keys, key_width, pair_context, value_width, s.values, value_width);
          scale_rows(s.values, tokens * value_width, static_cast<T>(a.output_scale));
          store_tokens(a.output, batch, head, token, tokens, values, s.values, value_width);
        });
  }

  // grad_context = output_scale P^T grad_output + its own gradient, and grad_query
  void backward_queries(const T* context, T* grad_context) const {
    const std::int64_t size = context_size(), packed = values * key_width;
    Workspace memory(sizeof(T) * static_cast<std::size_t>(pairs * (query_split.count * size + packed)));
    T* partials = static_cast<T*>(memory.data());
    T* context_transposed = partials + pairs * query_split.count * size;
    parallel_for(pairs, a.num_threads, 64, [&](std::int64_t pair, void*) {
      pack<Values<T>>(a.num_threads, context_transposed + pair * packed, context + pair * size, 1, value_width, values,
                      keys);
    });
    for_chunks<Blocks>(
        query_split, a.query_tokens, [&](Blocks&, std::int64_t i) { fill(partials + i * size, size, T(0)); },
        [&](Blocks& s, std::int64_t i, std::int64_t batch, std::int64_t head, std::int64_t token, std::int64_t tokens) {
          load_queries(batch, head, token, tokens, s.keys);
          load_tokens(a.grad_output, batch, head, token, tokens, values, s.grad_values, value_width);
          scale_rows(s.grad_values, tokens * value_width, static_cast<T>(a.output_scale));
          multiply_transposed_add<Values<T>>(keys, tokens, value_width, s.keys, key_width, s.grad_values, value_width,
                                             partials + i * size, value_width);
          multiply<Values<T>>(tokens, values, key_width, s.grad_values, value_width,
                              context_transposed + (batch * a.heads + head) * packed, s.grad_keys, key_width);
          if (query_softmax())
            softmax_rows_backward(s.keys, s.grad_keys, tokens, 1, key_width, query_factor(batch));
          else
            scale_rows(s.grad_keys, tokens * key_width, query_factor(batch));
          store_tokens(a.grad_query, batch, head, token, tokens, keys, s.grad_keys, key_width);
        });
    for_row_blocks([&](std::int64_t pair, std::int64_t first, std::int64_t last) {
      T* out = grad_context + pair * size;
      combine_partials<T>(partials + pair * query_split.count * size + first * value_width, nullptr, query_split.count,
                          size, (last - first) * value_width, out + first * value_width);
      if (!a.grad_context) return;
      const T* own = static_cast<const T*>(a.grad_context) + pair * keys * values;
      for (std::int64_t row = first; row < last; ++row)
        for (std::int64_t c = 0; c < values; ++c) out[row * value_width + c] += own[row * values + c];
    });
  }

  void backward_keys(const T* context, const T* grad_context) const {
    const std::int64_t size = context_size(), packed = values * key_width;
    Workspace memory(sizeof(T) * static_cast<std::size_t>(pairs * (packed + 3 * key_width)));
    T* grad_transposed = static_cast<T*>(memory.data());
    T* rows = grad_transposed + pairs * packed;  // per pair: max, 1 / sum, delta
    parallel_for(pairs, a.num_threads, 64, [&](std::int64_t pair, void*) {
      const T *c = context + pair * size, *g = grad_context + pair * size;
      pack<Values<T>>(a.num_threads, grad_transposed + pair * packed, g, 1, value_width, values, keys);
      T* row = rows + pair * 3 * key_width;
      copy_padded(row, static_cast<const T*>(a.key_max) + pair * keys, keys);
      for (std::int64_t j = 0; j < key_width; ++j) {
        const T sum = j < keys ? static_cast<const T*>(a.key_sum)[pair * keys + j] : T(0);
        row[key_width + j] = sum == T(0) ? T(0) : T(1) / sum;
        row[2 * key_width + j] = j < keys ? key_softmax_delta(c + j * value_width, g + j * value_width, values) : T(0);
      }
    });
    for_chunks<Blocks>(
        key_split, a.key_tokens, [](Blocks&, std::int64_t) {},
        [&](Blocks& s, std::int64_t, std::int64_t batch, std::int64_t head, std::int64_t token, std::int64_t tokens) {
          const std::int64_t pair = batch * a.heads + head;
          T* row = rows + pair * 3 * key_width;
          load_keys(batch, head, token, tokens, s);
          if (a.softmax) key_softmax(tokens, key_width, s.keys, row, row + key_width);
          multiply_rows(tokens, keys, value_width, s.keys, key_width, grad_context + pair * size, value_width,
                        s.grad_values, value_width);
          store_tokens(a.grad_value, batch, head, token, tokens, values, s.grad_values, value_width);
          multiply<Values<T>>(tokens, values, key_width, s.values, value_width, grad_transposed + pair * packed,
                              s.grad_keys, key_width);
          if (a.softmax) {
            if (tokens == a.key_tokens)
              key_softmax_delta_of_block(tokens, key_width, s.keys, s.grad_keys, row + 2 * key_width);
            key_softmax_backward(tokens, key_width, s.keys, row + 2 * key_width, s.grad_keys);
          }
          scale_rows(s.grad_keys, tokens * key_width, key_factor(batch));
          apply_mask<T>(a.mask, batch, token, tokens, T(0), s.grad_keys, key_width, nullptr, 0);
          store_tokens(a.grad_key, batch, head, token, tokens, keys, s.grad_keys, key_width);
        });
  }

  void backward() const {
    const std::int64_t size = pairs * context_size();
    Workspace memory(2 * sizeof(T) * static_cast<std::size_t>(size));
    T *context = static_cast<T*>(memory.data()), *grad_context = context + size;
    load_context(a.context, context);
    backward_queries(context, grad_context);
    backward_keys(context, grad_context);
  }
};

}  // namespace

void attention_forward(const AttentionArguments& a) {
  with_values(a.key.dtype, [&](auto engine) { Attention<typename decltype(engine)::Value>(a).forward(); });
}

void attention_backward(const AttentionArguments& a) {
  with_values(a.key.dtype, [&](auto engine) { Attention<typename decltype(engine)::Value>(a).backward(); });
}

}  // namespace msformer::MSFORMER_VARIANT
