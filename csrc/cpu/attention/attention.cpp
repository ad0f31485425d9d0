// Efficient attention on query, key, value (Shen et al., 2021): output = rho_q(Q) (rho_k(K)^T V), forward and backward;
// and linear attention of ReLU features (Cai et al., 2023), which divides by rho_q(Q) . sum rho_k(K).
//
// Forward: one pass over keys and values builds the context of every head, chunk by chunk with an online softmax; one
// pass over the queries writes the output. Backward: one pass over queries and grad_output builds the gradient of the
// context and writes that of the queries; one pass over keys and values writes theirs. Blocks of kBlockTokens tokens
// are held in scratch, as Rows or Columns; the normalised queries and keys never reach memory.
#include "columns.h"
#include "rows.h"

namespace msformer::MSFORMER_VARIANT {
namespace {

constexpr auto kNothing = [](auto&, std::int64_t, std::int64_t, std::int64_t) {};

// The products of a block of tokens, for the choice of the engine.
struct AttentionProducts {
  ProductShape shapes[3];
  explicit AttentionProducts(const AttentionArguments& a) {
    const std::int64_t tokens = min_of(a.key_tokens, kBlockTokens);
    shapes[0] = {tokens, a.key_channels, a.value_channels, false};
    shapes[1] = {tokens, a.value_channels, a.key_channels, false};
    shapes[2] = {a.key_channels, tokens, a.value_channels, true};
  }
};

template <class E>
struct Attention : Problem<E> {
  using T = typename E::Value;
  using Element = typename E::Element;
  using Base = Problem<E>;
  using Base::a, Base::pairs, Base::keys, Base::values, Base::key_width, Base::value_width, Base::context_size;

  Attention(const AttentionArguments& arguments, const E& engine) : Base(arguments, engine) {}

  const std::int64_t packed_size = this->engine.packed_size(keys, value_width);
  const std::int64_t transposed_size = this->engine.packed_size(values, key_width);

  // contexts and key sums with padding, from the user's contiguous [B, H, Dk, Dv] and [B, H, Dk]
  void load_context(T* out) const {
    this->for_row_blocks([&](std::int64_t pair, std::int64_t first, std::int64_t last) {
      T* context = out + pair * context_size();
      for (std::int64_t row = first; row < last; ++row)
        copy_padded(context + row * value_width, static_cast<const T*>(a.context) + (pair * keys + row) * values,
                    values);
      if (first == 0) copy_padded(context + this->key_sum_at(), static_cast<const T*>(a.key_sum) + pair * keys, keys);
    });
  }

  template <class Blocks>
  void build_context(T* contexts) const {
    const Split& split = this->key_split;
    const std::int64_t size = KeySums<T>::size(keys, value_width);
    Workspace partials(sizeof(T) * static_cast<std::size_t>(pairs * split.count * size));
    T* sums = static_cast<T*>(partials.data());
    this->template for_chunks<Blocks>(
        split, a.key_tokens,
        [&](Blocks& blocks, std::int64_t i, std::int64_t batch, std::int64_t head) {
          const KeySums<T> chunk(sums + i * size, keys);
          reset(chunk, keys, value_width);
          if (i % split.count) return;
          for_blocks_of(0, a.memory_tokens, [&](std::int64_t token, std::int64_t tokens) {
            blocks.add_keys(this->of_memory(), batch, head, token, tokens, chunk);
          });
        },
        [&](Blocks& blocks, std::int64_t i, std::int64_t batch, std::int64_t head, std::int64_t token,
            std::int64_t tokens) {
          blocks.add_keys(this->of_images(), batch, head, token, tokens, KeySums<T>(sums + i * size, keys));
        });
    this->for_row_blocks([&](std::int64_t pair, std::int64_t first, std::int64_t last) {
      const T* chunks = sums + pair * split.count * size;
      T *max = static_cast<T*>(a.key_max) + pair * keys, *sum = static_cast<T*>(a.key_sum) + pair * keys;
      T* context = contexts + pair * context_size();
      const bool kept = this->kept_tokens(pair / a.heads) > 0;
      for (std::int64_t row = first; row < last; ++row) {
        T* out = context + row * value_width;
        if (this->softmax()) {
          combine_keys(chunks, split.count, keys, row, value_width, kept, max + row, sum + row, out);
        } else {
          max[row] = T(0);
          combine_partials<T>(chunks + key_width + row, nullptr, split.count, size, 1, sum + row);
          combine_partials<T>(chunks + 2 * key_width + row * value_width, nullptr, split.count, size, value_width, out);
        }
        std::memcpy(static_cast<T*>(a.context) + (pair * keys + row) * values, out,
                    sizeof(T) * static_cast<std::size_t>(values));
      }
    });
    parallel_for(pairs, a.num_threads, 0, [&](std::int64_t pair, void*) {
      copy_padded(contexts + pair * context_size() + this->key_sum_at(), static_cast<const T*>(a.key_sum) + pair * keys,
                  keys);
    });
  }

  template <class Blocks>
  void write_output(const T* contexts) const {
    Workspace memory(sizeof(Element) * static_cast<std::size_t>(pairs * packed_size));
    Element* packed = static_cast<Element*>(memory.data());
    pack_contexts(contexts, packed);
    this->template for_chunks<Blocks>(this->query_split, a.query_tokens, kNothing,
                                      [&](Blocks& blocks, std::int64_t, std::int64_t batch, std::int64_t head,
                                          std::int64_t token, std::int64_t tokens) {
                                        const std::int64_t pair = batch * a.heads + head;
                                        blocks.write_output(batch, head, token, tokens,
                                                            contexts + pair * context_size(),
                                                            packed + pair * packed_size);
                                      });
  }

  // grad_context = output_scale P^T grad_output + its own gradient, and grad_query
  template <class Blocks>
  void backward_queries(const T* contexts, T* grad_contexts) const {
    const Split& split = this->query_split;
    const std::int64_t size = context_size(), partials_size = pairs * split.count * size;
    Workspace memory(sizeof(T) * static_cast<std::size_t>(partials_size) + 64 +
                     sizeof(Element) * static_cast<std::size_t>(pairs * transposed_size));
    Arena arena(memory.data());
    T* partials = arena.take<T>(partials_size);
    Element* transposed = arena.take<Element>(pairs * transposed_size);
    pack_transposed(contexts, transposed);
    this->template for_chunks<Blocks>(
        split, a.query_tokens,
        [&](Blocks&, std::int64_t i, std::int64_t, std::int64_t) { fill(partials + i * size, size, T(0)); },
        [&](Blocks& blocks, std::int64_t i, std::int64_t batch, std::int64_t head, std::int64_t token,
            std::int64_t tokens) {
          const std::int64_t pair = batch * a.heads + head;
          blocks.write_query_gradient(batch, head, token, tokens, contexts + pair * size,
                                      transposed + pair * transposed_size, partials + i * size);
        });
    double scales[64];  // split_tokens makes at most 64 chunks
    for (double& scale : scales) scale = a.output_scale;
    this->for_row_blocks([&](std::int64_t pair, std::int64_t first, std::int64_t last) {
      const T* chunks = partials + pair * split.count * size;
      T* out = grad_contexts + pair * size;
      const std::int64_t begin = first * value_width, end = last == keys ? size : last * value_width;
      combine_partials<T>(chunks + begin, scales, split.count, size, end - begin, out + begin);
      const T* own = a.grad_context ? static_cast<const T*>(a.grad_context) + pair * keys * values : nullptr;
      for (std::int64_t row = first; own && row < last; ++row)
        for (std::int64_t c = 0; c < values; ++c) out[row * value_width + c] += own[row * values + c];
      // delta is subtracted from products with these rows, most of which it cancels: both must see the same rounding
      this->engine.round_operands(out + begin, (last - first) * value_width);
    });
  }

  template <class Blocks>
  void backward_keys(const T* contexts, const T* grad_contexts) const {
    const std::int64_t size = context_size();
    Workspace memory(sizeof(T) * static_cast<std::size_t>(pairs * 3 * key_width) + 128 +
                     sizeof(Element) * static_cast<std::size_t>(pairs * (packed_size + transposed_size)));
    Arena arena(memory.data());
    T* rows = arena.take<T>(pairs * 3 * key_width);
    Element *packed = arena.take<Element>(pairs * packed_size),
            *transposed = arena.take<Element>(pairs * transposed_size);
    pack_contexts(grad_contexts, packed);
    pack_transposed(grad_contexts, transposed);
    parallel_for(pairs, a.num_threads, 64, [&](std::int64_t pair, void*) {
      const T *c = contexts + pair * size, *g = grad_contexts + pair * size;
      const KeyStatistics<T> row(rows + pair * 3 * key_width, key_width);
      copy_padded(row.max, static_cast<const T*>(a.key_max) + pair * keys, keys);
      for (std::int64_t j = 0; j < key_width; ++j) {
        const T sum = j < keys ? static_cast<const T*>(a.key_sum)[pair * keys + j] : T(0);
        row.inverse_sum[j] = sum == T(0) ? T(0) : T(1) / sum;
        row.delta[j] = j < keys ? key_softmax_delta(c + j * value_width, g + j * value_width, values) : T(0);
      }
    });
    if (this->softmax() && a.memory_tokens && max_of(a.key_tokens, a.memory_tokens) <= Blocks::kTokens)
      sum_deltas<Blocks>(rows, grad_contexts, transposed);
    const auto write = [&](Blocks& blocks, const KeyTensors& tensors, std::int64_t batch, std::int64_t head,
                           std::int64_t token, std::int64_t tokens) {
      const std::int64_t pair = batch * a.heads + head;
      blocks.write_key_gradient(tensors, batch, head, token, tokens, grad_contexts + pair * size,
                                packed + pair * packed_size, transposed + pair * transposed_size,
                                KeyStatistics<T>(rows + pair * 3 * key_width, key_width));
    };
    this->template for_chunks<Blocks>(
        this->key_split, a.key_tokens, kNothing,
        [&](Blocks& blocks, std::int64_t, std::int64_t batch, std::int64_t head, std::int64_t token,
            std::int64_t tokens) { write(blocks, this->of_images(), batch, head, token, tokens); });
    if (a.memory_tokens) backward_memory<Blocks>(write);
  }

  // delta of one block of memory tokens and one of others as the sum it stands for (see add_key_softmax_delta)
  template <class Blocks>
  void sum_deltas(T* rows, const T* grad_contexts, const Element* transposed) const {
    this->template for_chunks<Blocks>(
        {1, 1}, 1, kNothing,
        [&](Blocks& blocks, std::int64_t pair, std::int64_t batch, std::int64_t head, std::int64_t, std::int64_t) {
          const KeyStatistics<T> statistics(rows + pair * 3 * key_width, key_width);
          fill(statistics.delta, key_width, T(0));
          for (const KeyTensors& tensors : {this->of_memory(), this->of_images()})
            if (tensors.tokens)
              blocks.add_delta(tensors, batch, head, 0, tensors.tokens, grad_contexts + pair * context_size(),
                               transposed + pair * transposed_size, statistics);
        });
  }

  // the gradients of the memory: those of every image in a workspace, then their sums
  template <class Blocks, class Write>
  void backward_memory(const Write& write) const {
    const std::int64_t tokens = a.memory_tokens, size = tokens * (key_width + value_width);
    Workspace memory(sizeof(T) * static_cast<std::size_t>((pairs + a.heads) * size));
    T *grads = static_cast<T*>(memory.data()), *totals = grads + pairs * size;
    const auto in_workspace = [&](T* data, std::int64_t width) {
      return Activation{data, sizeof(T) == 8 ? DType::float64 : DType::float32, a.heads * size, size, width, 1};
    };
    KeyTensors tensors = this->of_memory();
    tensors.grad_key = in_workspace(grads, key_width);
    tensors.grad_value = in_workspace(grads + tokens * key_width, value_width);
    this->template for_chunks<Blocks>({1, tokens}, tokens, kNothing,
                                      [&](Blocks& blocks, std::int64_t i, std::int64_t batch, std::int64_t head,
                                          std::int64_t token, std::int64_t count) {
                                        if (token == 0) fill(grads + i * size, size, T(0));
                                        write(blocks, tensors, batch, head, token, count);
                                      });
    parallel_for(a.heads, a.num_threads, 0, [&](std::int64_t head, void*) {
      T* total = totals + head * size;
      combine_partials<T>(grads + head * size, nullptr, a.batch, a.heads * size, size, total);
      store_tokens(a.grad_memory_key, 0, head, 0, tokens, keys, total, key_width);
      store_tokens(a.grad_memory_value, 0, head, 0, tokens, values, total + tokens * key_width, value_width);
    });
  }

  void forward() const {
    Workspace memory(sizeof(T) * static_cast<std::size_t>(pairs * context_size()));
    T* contexts = static_cast<T*>(memory.data());
    is_by_columns(a.key) ? build_context<Columns<E>>(contexts) : build_context<Rows<E>>(contexts);
    is_by_columns(a.query) ? write_output<Columns<E>>(contexts) : write_output<Rows<E>>(contexts);
  }

  void backward() const {
    const std::int64_t size = pairs * context_size();
    Workspace memory(2 * sizeof(T) * static_cast<std::size_t>(size));
    T *contexts = static_cast<T*>(memory.data()), *grads = contexts + size;
    load_context(contexts);
    is_by_columns(a.query) ? backward_queries<Columns<E>>(contexts, grads) : backward_queries<Rows<E>>(contexts, grads);
    is_by_columns(a.key) ? backward_keys<Columns<E>>(contexts, grads) : backward_keys<Rows<E>>(contexts, grads);
  }

 private:
  // of every pair, as a right-hand side [keys, values]
  void pack_contexts(const T* matrices, Element* out) const {
    parallel_for(pairs, a.num_threads, 64, [&](std::int64_t pair, void*) {
      pack(this->engine, a.num_threads, out + pair * packed_size, matrices + pair * context_size(), value_width, 1,
           keys, values);
    });
  }

  // the same as [values, keys]
  void pack_transposed(const T* matrices, Element* out) const {
    parallel_for(pairs, a.num_threads, 64, [&](std::int64_t pair, void*) {
      pack(this->engine, a.num_threads, out + pair * transposed_size, matrices + pair * context_size(), 1, value_width,
           values, keys);
    });
  }
};

// calls task(engine); columns are multiplied as values, whatever the precision
template <class Task>
void with_engine_of(const AttentionArguments& a, const Task& task) {
  if (is_by_columns(a.key) && is_by_columns(a.query))
    return with_arithmetic(a.key.dtype, [&](auto arithmetic) { task(Values<decltype(arithmetic)>()); });
  with_engine(a.key.dtype, a.precision, AttentionProducts(a).shapes, task);
}

}  // namespace

void attention_forward(const AttentionArguments& a) {
  with_engine_of(a, [&](auto engine) { Attention<decltype(engine)>(a, engine).forward(); });
}

void attention_backward(const AttentionArguments& a) {
  with_engine_of(a, [&](auto engine) { Attention<decltype(engine)>(a, engine).backward(); });
}

}  // namespace msformer::MSFORMER_VARIANT
