// Forward of efficient self-attention, folded: with X the (layer-normed) tokens,
//     A = rho_k(X W_k)^T X,   G = A W_v + 1 b_v^T,   Y = rho_q(X W_q + b_q) (G W_o) + b_o  [+ x]
// Exact: rho_k's columns sum to 1, and b_k cancels in the softmax over tokens. Two passes over X; queries, keys and
// values live in scratch, kBlockTokens tokens at a time. A and the softmax statistics are returned for the backward.
#include "folded.h"
#include "memory.h"

namespace msformer::MSFORMER_VARIANT {
namespace {

template <class E>
struct Forward : SelfAttention<E> {
  using Base = SelfAttention<E>;
  using T = typename E::Value;
  using Element = typename E::Element;
  using Weights = typename Base::Weights;
  using Base::a, Base::channels, Base::keys, Base::values, Base::heads, Base::head_values, Base::width, Base::key_width,
      Base::query_width, Base::head_value_width, Base::split, Base::parameter;

  Forward(const SelfAttentionArguments& arguments, const E& engine) : Base(arguments, engine) {}

  struct Blocks {
    T *x, *features;
    Blocks(Arena& arena, const Forward& f)
        : x(arena.take<T>(kBlockTokens * f.width)),
          features(arena.take<T>(kBlockTokens * max_of(f.width, max_of(f.query_width, f.key_width)))) {}
  };

  std::size_t scratch_bytes() const {
    Arena counter(nullptr);
    Blocks(counter, *this);
    Blocks(counter, *this);
    return counter.used();
  }

  // A [B, keys, width]
  void reduce_tokens(const Weights& w, const MemoryTokens<T>& memory_tokens, T* key_tokens) const {
    const std::int64_t size = KeySums<T>::size(keys, width);
    Workspace partials(sizeof(T) * static_cast<std::size_t>(this->chunks() * size));
    T* sums = static_cast<T*>(partials.data());
    parallel_for(this->chunks(), a.num_threads, scratch_bytes(), [&](std::int64_t chunk, void* memory) {
      Arena arena(memory);
      Blocks s(arena, *this);
      KeySums<T> chunk_sums(sums + chunk * size, keys);
      reset(chunk_sums, keys, width);
      this->for_blocks(chunk, [&](std::int64_t batch, std::int64_t token, std::int64_t tokens) {
        this->load_x(w.norm, batch, token, tokens, s.x, nullptr, nullptr);
        multiply(this->engine, tokens, channels, key_width, s.x, width, w.key, s.features, key_width);
        apply_mask(a.mask, batch, token, tokens, -kInfinity<T>, s.features, key_width, s.x, width);
        accumulate_keys(this->engine, tokens, keys, s.features, s.x, width, chunk_sums);
      });
    });
    parallel_for(a.batch * keys, a.num_threads, 64, [&](std::int64_t i, void*) {
      const std::int64_t batch = i / keys;
      T *max = static_cast<T*>(a.key_max) + i, *sum = static_cast<T*>(a.key_sum) + i;
      combine_keys(sums + batch * split.count * size, split.count, keys, i % keys, width,
                   !memory_tokens.count && this->any_kept(batch), max, sum, key_tokens + i * width);
      if (memory_tokens.count) memory_tokens.join(i % keys, width, max, sum, key_tokens + i * width);
      std::memcpy(static_cast<T*>(a.key_tokens) + i * channels, key_tokens + i * width,
                  sizeof(T) * static_cast<std::size_t>(channels));
    });
  }

  // G [B, keys, head_value_width] = A W_v + 1 b_v^T, or see memory.h, for every head; and the user's copy
  void make_context(const T* key_tokens, const MemoryTokens<T>& memory_tokens, T* context) const {
    const std::int64_t packed = channels * head_value_width;
    Workspace memory(sizeof(T) * static_cast<std::size_t>(heads * (packed + head_value_width)));
    T* value_weight = static_cast<T*>(memory.data());
    T* bias = value_weight + heads * packed;
    for (std::int64_t head = 0; head < heads; ++head) {
      const std::int64_t first = head * head_values;
      pack(Values<T>(), a.num_threads, value_weight + head * packed,
           parameter(a.parameters.value_weight) + first * channels, 1, channels, channels, head_values);
      copy_padded(bias + head * head_value_width,
                  a.parameters.value_bias ? parameter(a.parameters.value_bias) + first : nullptr, head_values);
    }
    this->for_row_blocks([&](std::int64_t batch, std::int64_t head, std::int64_t row, std::int64_t rows) {
      T* out = context + (batch * keys + row) * head_value_width;
      const bool kept = this->any_kept(batch);
      multiply(Values<T>(), rows, channels, head_value_width, key_tokens + (batch * keys + row) * width, width,
               value_weight + head * packed, out, head_value_width,
               kept && !memory_tokens.count ? bias + head * head_value_width : nullptr);
      for (std::int64_t i = 0; i < rows; ++i) {
        const std::int64_t at = batch * keys + row + i;
        if (memory_tokens.count)
          memory_tokens.add_to_context(row + i, parameter(a.key_max)[at], parameter(a.key_sum)[at], kept,
                                       out + i * head_value_width);
        std::memcpy(static_cast<T*>(a.context) + at * head_values, out + i * head_value_width,
                    sizeof(T) * static_cast<std::size_t>(head_values));
      }
    });
  }

  void write_output(const Weights& w, const Element* folded, const T* output_bias) const {
    parallel_for(this->chunks(), a.num_threads, scratch_bytes(), [&](std::int64_t chunk, void* memory) {
      Arena arena(memory);
      Blocks s(arena, *this), t(arena, *this);
      this->for_blocks(chunk, [&](std::int64_t batch, std::int64_t token, std::int64_t tokens) {
        this->load_x(w.norm, batch, token, tokens, s.x, nullptr, nullptr);
        this->load_queries(w, tokens, s.x, s.features);
        multiply(this->engine, tokens, this->query_rows, width, s.features, query_width,
                 folded + batch * this->engine.packed_size(this->query_rows, width), t.features, width, output_bias);
        if (a.residual) {
          load_tokens(a.x, batch, 0, token, tokens, channels, s.x, width);
          add_rows(tokens, width, s.x, t.features);
        }
        store_tokens(a.output, batch, 0, token, tokens, channels, t.features, width);
      });
    });
  }

  struct Matrices {
    T *key_tokens, *context, *folded, *output_bias;  // row-major: [B, keys, width], [B, keys, head_value_width], ...
    Element* folded_packed;                          // of each image
    Matrices(Arena& arena, const Forward& f)
        : key_tokens(arena.take<T>(f.a.batch * f.keys * f.width)),
          context(arena.take<T>(f.a.batch * f.keys * f.head_value_width)),
          folded(arena.take<T>(f.a.batch * f.query_width * f.width)),
          output_bias(arena.take<T>(f.width)),
          folded_packed(arena.take<Element>(f.a.batch * f.engine.packed_size(f.query_rows, f.width))) {}
  };

  void run() const {
    Arena counter(nullptr);
    Weights(counter, *this);
    MemoryTokens<T>(counter, a);
    Matrices(counter, *this);
    Workspace memory(counter.used());
    Arena arena(memory.data());
    Weights w(arena, *this);
    w.fill_in(*this);
    MemoryTokens<T> memory_tokens(arena, a);
    memory_tokens.fill_in();
    const Matrices m(arena, *this);
    copy_padded(m.output_bias, a.parameters.output_bias, channels);
    reduce_tokens(w, memory_tokens, m.key_tokens);
    make_context(m.key_tokens, memory_tokens, m.context);
    this->fold(m.context, m.folded);
    this->pack_rows(m.folded_packed, m.folded, a.batch, this->query_rows, query_width * width);
    write_output(w, m.folded_packed, m.output_bias);
  }
};

}  // namespace

void self_attention_forward(const SelfAttentionArguments& a) {
  if (self_attention_is_unfolded(a)) return self_attention_unfolded_forward(a);
  with_engine(a.x.dtype, a.precision, FoldedProducts(a).shapes,
              [&](auto engine) { Forward<decltype(engine)>(a, engine).run(); });
}

}  // namespace msformer::MSFORMER_VARIANT
