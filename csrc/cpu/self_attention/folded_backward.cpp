// Backward of folded efficient self-attention, by recomputation from x and a few small matrices.
//
// Pass 1 over x and grad_output reduces dM = P^T dY, the gradient of the folded matrix M = G W_o. The small products
// then give the gradients of the context, of W_o, W_v, b_v and of A, and delta_j = <A_j, dA_j>, the closed form of
// sum_n S_nj dS_nj, which spares a third pass. Pass 2 recomputes queries and keys and writes grad_x; the gradients of
// W_q and W_k are summed over tokens in a fixed number of groups of chunks. Where they fit, pass 1 leaves its queries
// for pass 2.
#include "folded.h"
#include "memory.h"

namespace msformer::MSFORMER_VARIANT {
namespace {

template <class E>
struct Backward : SelfAttention<E> {
  using Base = SelfAttention<E>;
  using T = typename E::Value;
  using Element = typename E::Element;
  using Weights = typename Base::Weights;
  using Base::a, Base::channels, Base::keys, Base::values, Base::heads, Base::head_keys, Base::head_values, Base::width,
      Base::key_width, Base::query_width, Base::head_width, Base::head_value_width, Base::split, Base::parameter;

  const std::int64_t folded_size = query_width * width, context_size = keys * head_value_width,
                     rows_size = keys * width;
  const std::int64_t folded_packed_size = this->engine.packed_size(channels, query_width);
  const std::int64_t rows_packed_size = this->engine.packed_size(channels, key_width),
                     rows_right_size = this->engine.packed_size(keys, width);

  static constexpr std::int64_t kMostKept = 4 << 20;
  const std::int64_t all_queries = a.batch * a.tokens * query_width;
  const std::int64_t kept_queries = all_queries <= kMostKept ? all_queries : 0;  // from pass 1 for pass 2

  // Per image, and what pass 2 multiplies with.
  struct Matrices {
    T *context, *key_tokens, *folded, *grad_folded, *grad_context, *grad_key_tokens;  // row-major
    Element *folded_packed, *grad_key_tokens_packed;                                  // transposed: [C, ...]
    Element *grad_key_tokens_right, *query_right, *key_right;                         // packed as they are
    T *max, *inverse_sum, *delta;                                                     // [key_width]
    T* queries;                                                                       // [N, query_width] or none
    Matrices(Arena& arena, const Backward& b) {
      const std::int64_t n = b.a.batch;
      context = arena.take<T>(n * b.context_size);
      key_tokens = arena.take<T>(n * b.rows_size);
      folded = arena.take<T>(n * b.folded_size);
      grad_folded = arena.take<T>(n * b.folded_size);
      grad_context = arena.take<T>(n * b.context_size);
      grad_key_tokens = arena.take<T>(n * b.rows_size);
      folded_packed = arena.take<Element>(n * b.folded_packed_size);
      grad_key_tokens_packed = arena.take<Element>(n * b.rows_packed_size);
      grad_key_tokens_right = arena.take<Element>(n * b.rows_right_size);
      query_right = arena.take<Element>(b.engine.packed_size(b.query_rows, b.width));
      key_right = arena.take<Element>(b.rows_right_size);
      max = arena.take<T>(n * b.key_width);
      inverse_sum = arena.take<T>(n * b.key_width);
      delta = arena.take<T>(n * b.key_width);
      queries = arena.take<T>(b.kept_queries);
    }
  };

  struct Blocks {
    T *x, *normalized, *grad_output, *queries, *grad_queries, *keys, *grad_keys, *grad_x, *rstd;
    Blocks(Arena& arena, const Backward& b)
        : x(arena.take<T>(kBlockTokens * b.width)),
          normalized(arena.take<T>(kBlockTokens * b.width)),
          grad_output(arena.take<T>(kBlockTokens * b.width)),
          queries(arena.take<T>(kBlockTokens * b.query_width)),
          grad_queries(arena.take<T>(kBlockTokens * b.query_width)),
          keys(arena.take<T>(kBlockTokens * b.key_width)),
          grad_keys(arena.take<T>(kBlockTokens * b.key_width)),
          grad_x(arena.take<T>(kBlockTokens * b.width)),
          rstd(arena.take<T>(kBlockTokens)) {}
  };

  // Gradients that are summed over tokens; one of these a group of chunks.
  struct TokenSums {
    T *query_weight, *key_weight, *query_bias, *output_bias, *norm_weight, *norm_bias;
    TokenSums(Arena& arena, const Backward& b)
        : query_weight(arena.take<T>(b.query_width * b.width)),
          key_weight(arena.take<T>(b.keys * b.width)),
          query_bias(arena.take<T>(b.query_width)),
          output_bias(arena.take<T>(b.width)),
          norm_weight(arena.take<T>(b.width)),
          norm_bias(arena.take<T>(b.width)) {}
  };

  Backward(const SelfAttentionArguments& arguments, const E& engine) : Base(arguments, engine) {}

  // where the queries of a block are: among those that pass 1 keeps, or in scratch
  T* queries_of(const Matrices& m, std::int64_t batch, std::int64_t token, const Blocks& s) const {
    return kept_queries ? m.queries + (batch * a.tokens + token) * query_width : s.queries;
  }

  template <class Pieces>
  std::size_t bytes_of() const {
    Arena counter(nullptr);
    Pieces(counter, *this);
    return counter.used();
  }

  void load_state(Matrices& m) const {
    parallel_for(a.batch, a.num_threads, 64, [&](std::int64_t n, void*) {
      for (std::int64_t row = n * keys; row < (n + 1) * keys; ++row)
        copy_padded(m.context + row * head_value_width, parameter(a.context) + row * head_values, head_values);
      stage(m.key_tokens + n * rows_size, parameter(a.key_tokens) + n * keys * channels, keys, channels);
    });
    this->fold(m.context, m.folded);
    parallel_for(a.batch, a.num_threads, 64, [&](std::int64_t n, void*) {
      pack(this->engine, a.num_threads, m.folded_packed + n * folded_packed_size, m.folded + n * folded_size, 1, width,
           channels, query_width);
      copy_padded(m.max + n * key_width, parameter(a.key_max) + n * keys, keys);
      fill(m.inverse_sum + n * key_width, key_width, T(0));
      for (std::int64_t j = 0; j < keys; ++j) {
        const T sum = parameter(a.key_sum)[n * keys + j];
        m.inverse_sum[n * key_width + j] = sum == T(0) ? T(0) : T(1) / sum;
      }
    });
  }

  // pass 1: grad_folded = P^T grad_output
  void reduce_grad_folded(const Weights& w, const Matrices& m) const {
    Workspace partials(sizeof(T) * static_cast<std::size_t>(this->chunks() * folded_size));
    T* sums = static_cast<T*>(partials.data());
    parallel_for(this->chunks(), a.num_threads, bytes_of<Blocks>(), [&](std::int64_t chunk, void* memory) {
      Arena arena(memory);
      Blocks s(arena, *this);
      T* sum = sums + chunk * folded_size;
      fill(sum, folded_size, T(0));
      this->for_blocks(chunk, [&](std::int64_t batch, std::int64_t token, std::int64_t tokens) {
        this->load_x(w.norm, batch, token, tokens, s.x, nullptr, nullptr);
        T* queries = queries_of(m, batch, token, s);
        this->load_queries(w, tokens, s.x, queries);
        load_tokens(a.grad_output, batch, 0, token, tokens, channels, s.grad_output, width);
        multiply_transposed_add(this->engine, this->query_rows, tokens, width, queries, query_width, s.grad_output,
                                width, sum, width);
      });
    });
    parallel_for(a.batch * query_width, a.num_threads, 64, [&](std::int64_t i, void*) {
      const std::int64_t batch = i / query_width, row = i % query_width;
      combine_partials<T>(sums + batch * split.count * folded_size + row * width, nullptr, split.count, folded_size,
                          width, m.grad_folded + i * width);
    });
  }

  // gradients of the context and of A, row by row of the key features
  void small_products(Matrices& m, const MemoryTokens<T>& memory_tokens) const {
    const std::int64_t output_packed = channels * head_value_width, value_packed = head_values * width;
    Workspace memory(sizeof(T) * static_cast<std::size_t>(heads * (output_packed + value_packed)));
    T* output_weight = static_cast<T*>(memory.data());
    T* value_weight = output_weight + heads * output_packed;
    for (std::int64_t head = 0; head < heads; ++head) {
      const std::int64_t first = head * head_values;
      pack(Values<T>(), a.num_threads, output_weight + head * output_packed,
           parameter(a.parameters.output_weight) + first, values, 1, channels, head_values);
      pack(Values<T>(), a.num_threads, value_weight + head * value_packed,
           parameter(a.parameters.value_weight) + first * channels, channels, 1, head_values, channels);
    }
    this->for_row_blocks([&](std::int64_t batch, std::int64_t head, std::int64_t row, std::int64_t rows) {
      const std::int64_t first = batch * keys + row;
      T* grad_context = m.grad_context + first * head_value_width;
      multiply(Values<T>(), rows, channels, head_value_width,
               m.grad_folded + (batch * query_width + this->query_row(row)) * width, width,
               output_weight + head * output_packed, grad_context, head_value_width);
      if (a.grad_context)
        for (std::int64_t i = 0; i < rows; ++i)
          for (std::int64_t c = 0; c < head_values; ++c)
            grad_context[i * head_value_width + c] += parameter(a.grad_context)[(first + i) * head_values + c];
      T* grad_rows = m.grad_key_tokens + first * width;
      multiply(Values<T>(), rows, head_values, width, grad_context, head_value_width,
               value_weight + head * value_packed, grad_rows, width);
      // delta is subtracted from products with these rows, most of which it cancels: both must see the same rounding
      this->engine.round_operands(grad_rows, rows * width);
      for (std::int64_t i = 0; i < rows; ++i) {
        T& delta = m.delta[batch * key_width + row + i];
        delta = key_softmax_delta(m.key_tokens + (first + i) * width, grad_rows + i * width, channels);
        if (memory_tokens.count)
          delta += memory_tokens.of_delta(row + i, parameter(a.key_max)[first + i], parameter(a.key_sum)[first + i],
                                          grad_context + i * head_value_width);
      }
    });
    parallel_for(a.batch, a.num_threads, 64, [&](std::int64_t n, void*) {
      pack(this->engine, a.num_threads, m.grad_key_tokens_packed + n * rows_packed_size,
           m.grad_key_tokens + n * rows_size, 1, width, channels, keys);
    });
  }

  // W_o [C, Dv], W_v [Dv, C] and b_v: sums over images and key features, in blocks of rows
  void small_gradients(const Matrices& m, const MemoryTokens<T>& memory_tokens) const {
    const std::int64_t output_blocks = (channels + 47) / 48, value_blocks = (head_values + 47) / 48;
    const std::size_t scratch = sizeof(T) * 48 * static_cast<std::size_t>(max_of(width, head_value_width));
    parallel_for(heads * (output_blocks + value_blocks), a.num_threads, scratch, [&](std::int64_t i, void* memory) {
      T* sum = static_cast<T*>(memory);
      const std::int64_t head = i / (output_blocks + value_blocks), block = i % (output_blocks + value_blocks);
      const bool output = block < output_blocks;
      const std::int64_t first = (output ? block : block - output_blocks) * 48;
      const std::int64_t rows = min_of<std::int64_t>(48, (output ? channels : head_values) - first);
      const std::int64_t columns = output ? head_values : channels, leading = padded<T>(columns);
      fill(sum, rows * leading, T(0));
      for (std::int64_t n = 0; n < a.batch; ++n) {
        const T* context_rows =
            (output ? m.context : m.grad_context) + n * context_size + head * head_keys * head_value_width;
        if (output)
          multiply_transposed_add(Values<T>(), rows, head_keys, leading,
                                  m.grad_folded + n * folded_size + head * head_width * width + first, width,
                                  context_rows, head_value_width, sum, leading);
        else
          multiply_transposed_add(Values<T>(), rows, head_keys, leading, context_rows + first, head_value_width,
                                  m.key_tokens + n * rows_size + head * head_keys * width, width, sum, leading);
      }
      T* target = output ? static_cast<T*>(a.gradients.output_weight) + first * values + head * head_values
                         : static_cast<T*>(a.gradients.value_weight) + (head * head_values + first) * channels;
      const std::int64_t target_row = output ? values : channels;
      for (std::int64_t r = 0; r < rows; ++r)
        std::memcpy(target + r * target_row, sum + r * leading, sizeof(T) * static_cast<std::size_t>(columns));
    });
    if (memory_tokens.count)
      memory_tokens.write_gradients(
          [&](std::int64_t batch, std::int64_t row, T& max, T& sum, T& delta, const T*& grad) {
            max = parameter(a.key_max)[batch * keys + row];
            sum = parameter(a.key_sum)[batch * keys + row];
            delta = m.delta[batch * key_width + row];
            grad = m.grad_context + (batch * keys + row) * head_value_width;
          });
    if (a.gradients.value_bias) value_bias_gradient(m, memory_tokens);
  }

  void value_bias_gradient(const Matrices& m, const MemoryTokens<T>& memory_tokens) const {
    Workspace memory(sizeof(double) * static_cast<std::size_t>(values));
    double* sums = static_cast<double*>(memory.data());
    for (std::int64_t v = 0; v < values; ++v) sums[v] = 0;
    for (std::int64_t n = 0; n < a.batch; ++n) {
      if (!this->any_kept(n)) continue;
      for (std::int64_t row = 0; row < keys; ++row) {
        const std::int64_t at = n * keys + row;
        const double share =
            memory_tokens.count
                ? static_cast<double>(memory_tokens.left(row, parameter(a.key_max)[at], parameter(a.key_sum)[at], true))
                : 1.0;
        const T* grad = m.grad_context + at * head_value_width;
        double* of_head = sums + row / head_keys * head_values;
        for (std::int64_t v = 0; v < head_values; ++v) of_head[v] += share * static_cast<double>(grad[v]);
      }
    }
    for (std::int64_t v = 0; v < values; ++v) static_cast<T*>(a.gradients.value_bias)[v] = static_cast<T>(sums[v]);
  }

  void block_backward(const Weights& w, const Matrices& m, Blocks& s, TokenSums& sums, std::int64_t batch,
                      std::int64_t token, std::int64_t tokens) const {
    this->load_x(w.norm, batch, token, tokens, s.x, s.normalized, s.rstd);
    load_tokens(a.grad_output, batch, 0, token, tokens, channels, s.grad_output, width);

    T* queries = queries_of(m, batch, token, s);
    if (!kept_queries) this->load_queries(w, tokens, s.x, queries);
    multiply(this->engine, tokens, channels, query_width, s.grad_output, width,
             m.folded_packed + batch * folded_packed_size, s.grad_queries, query_width);
    softmax_rows_backward(queries, s.grad_queries, tokens, heads, head_width, T(1));
    multiply(this->engine, tokens, this->query_rows, width, s.grad_queries, query_width, m.query_right, s.grad_x,
             width);
    multiply_transposed_add(this->engine, this->query_rows, tokens, width, s.grad_queries, query_width, s.x, width,
                            sums.query_weight, width);
    add_column_sums(tokens, query_width, s.grad_queries, query_width, sums.query_bias);
    add_column_sums(tokens, width, s.grad_output, width, sums.output_bias);

    multiply(this->engine, tokens, channels, key_width, s.x, width, w.key, s.keys, key_width);
    apply_mask(a.mask, batch, token, tokens, -kInfinity<T>, s.keys, key_width, s.x, width);
    key_softmax(tokens, key_width, s.keys, m.max + batch * key_width, m.inverse_sum + batch * key_width);
    multiply_add(this->engine, tokens, keys, width, s.keys, key_width,
                 m.grad_key_tokens_right + batch * rows_right_size, s.grad_x, width);
    multiply(this->engine, tokens, channels, key_width, s.x, width, m.grad_key_tokens_packed + batch * rows_packed_size,
             s.grad_keys, key_width);
    T* delta = m.delta + batch * key_width;
    if (tokens == a.tokens && !a.memory_tokens)
      key_softmax_delta_of_block(tokens, key_width, s.keys, s.grad_keys, delta);
    key_softmax_backward(tokens, key_width, s.keys, delta, s.grad_keys);
    multiply_add(this->engine, tokens, keys, width, s.grad_keys, key_width, m.key_right, s.grad_x, width);
    multiply_transposed_add(this->engine, keys, tokens, width, s.grad_keys, key_width, s.x, width, sums.key_weight,
                            width);

    if (w.norm.weight)
      layer_norm_backward(w.norm, tokens, channels, s.normalized, s.rstd, s.grad_x, width, sums.norm_weight,
                          sums.norm_bias);
    if (a.residual) add_rows(tokens, width, s.grad_output, s.grad_x);
    store_tokens(a.grad_x, batch, 0, token, tokens, channels, s.grad_x, width);
  }

  // pass 2
  void write_grad_x(const Weights& w, const Matrices& m) const {
    const std::int64_t size = static_cast<std::int64_t>(bytes_of<TokenSums>() / sizeof(T));
    const std::int64_t groups = group_count(this->chunks(), size * static_cast<std::int64_t>(sizeof(T)));
    Workspace partials(sizeof(T) * static_cast<std::size_t>((groups + 1) * size));
    T* memory = static_cast<T*>(partials.data());
    parallel_for(groups, a.num_threads, bytes_of<Blocks>(), [&](std::int64_t group, void* scratch) {
      Arena block_arena(scratch), sum_arena(memory + group * size);
      Blocks s(block_arena, *this);
      TokenSums sums(sum_arena, *this);
      fill(memory + group * size, size, T(0));
      for (std::int64_t chunk = this->chunks() * group / groups; chunk < this->chunks() * (group + 1) / groups; ++chunk)
        this->for_blocks(chunk, [&](std::int64_t batch, std::int64_t token, std::int64_t tokens) {
          block_backward(w, m, s, sums, batch, token, tokens);
        });
    });
    T* total = memory + groups * size;
    combine_groups(memory, groups, size, a.num_threads, total);
    Arena arena(total);
    TokenSums sums(arena, *this);
    for (std::int64_t row = 0; row < keys; ++row) {
      const std::size_t bytes = sizeof(T) * static_cast<std::size_t>(channels);
      std::memcpy(static_cast<T*>(a.gradients.query_weight) + row * channels,
                  sums.query_weight + this->query_row(row) * width, bytes);
      std::memcpy(static_cast<T*>(a.gradients.key_weight) + row * channels, sums.key_weight + row * width, bytes);
      if (a.gradients.query_bias) static_cast<T*>(a.gradients.query_bias)[row] = sums.query_bias[this->query_row(row)];
    }
    copy_out(sums.output_bias, channels, a.gradients.output_bias);
    copy_out(sums.norm_weight, channels, a.gradients.norm.weight);
    copy_out(sums.norm_bias, channels, a.gradients.norm.bias);
  }

  void run() const {
    Arena counter(nullptr);
    MemoryTokens<T>(counter, a);
    Workspace memory(bytes_of<Weights>() + bytes_of<Matrices>() + counter.used());
    Arena arena(memory.data());
    Weights w(arena, *this);
    Matrices m(arena, *this);
    MemoryTokens<T> memory_tokens(arena, a);
    w.fill_in(*this);
    memory_tokens.fill_in();
    load_state(m);
    reduce_grad_folded(w, m);
    small_products(m, memory_tokens);
    this->pack_rows(m.grad_key_tokens_right, m.grad_key_tokens, a.batch, keys, rows_size);
    this->pack_rows(m.query_right, w.query_rows, 1, this->query_rows, folded_size);
    this->pack_rows(m.key_right, w.key_rows, 1, keys, rows_size);
    small_gradients(m, memory_tokens);
    write_grad_x(w, m);
  }
};

}  // namespace

void self_attention_backward(const SelfAttentionArguments& a) {
  if (self_attention_is_unfolded(a)) return self_attention_unfolded_backward(a);
  with_engine(a.x.dtype, a.precision, FoldedProducts(a).shapes,
              [&](auto engine) { Backward<decltype(engine)>(a, engine).run(); });
}

}  // namespace msformer::MSFORMER_VARIANT
