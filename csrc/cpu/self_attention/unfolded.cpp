// Efficient self-attention without folding, forward and backward, for images with fewer tokens than channels.
//
// Folding multiplies the context into the output projection, Dk x Dv x C flop an image and head, to save the value and
// output projections of every token. With few tokens that is the larger number, so here the published form is computed:
// queries, keys and values of a group of images as whole matrices, all threads on one product at a time (dense.h), and
// the attention of the heads by the kernels of attention.cpp. The bias of the keys has no effect and is left out.
#include "../attention/attention.h"
#include "../attention/softmax.h"
#include "../engine/dense.h"
#include "self_attention.h"

namespace msformer::MSFORMER_VARIANT {
namespace {

struct UnfoldedProducts {
  ProductShape shapes[2];
  explicit UnfoldedProducts(const SelfAttentionArguments& a) {
    const std::int64_t tokens = images_at_once(a.batch, a.tokens) * a.tokens;
    shapes[0] = {tokens, a.channels, a.key_channels, true};  // weights are rewritten once a group, like tokens
    shapes[1] = {tokens, a.channels, a.value_channels, true};
  }
};

template <class E>
struct Unfolded {
  using T = typename E::Value;
  using Element = typename E::Element;
  const SelfAttentionArguments& a;
  const E engine;
  const std::int64_t channels = a.channels, keys = a.key_channels, values = a.value_channels;
  const std::int64_t width = padded<T>(channels), key_width = padded<T>(keys), value_width = padded<T>(values);
  const std::int64_t group_images = images_at_once(a.batch, a.tokens), group_tokens = group_images * a.tokens;

  Unfolded(const SelfAttentionArguments& arguments, const E& engine_) : a(arguments), engine(engine_) {}

  // weights packed for products with tokens, biases and norm padded
  struct Weights {
    Element *query, *key, *value;
    T *query_bias, *value_bias, *norm_weight, *norm_bias;
    Norm<T> norm;
    Weights(Arena& arena, const Unfolded& u)
        : query(arena.take<Element>(u.engine.packed_size(u.channels, u.key_width))),
          key(arena.take<Element>(u.engine.packed_size(u.channels, u.key_width))),
          value(arena.take<Element>(u.engine.packed_size(u.channels, u.value_width))),
          query_bias(arena.take<T>(u.key_width)),
          value_bias(arena.take<T>(u.value_width)),
          norm_weight(arena.take<T>(u.width)),
          norm_bias(arena.take<T>(u.width)) {}

    void fill_in(const Unfolded& u) {
      const SelfAttentionArguments& a = u.a;
      u.pack_linear(query, a.parameters.query_weight, u.channels, u.keys);
      u.pack_linear(key, a.parameters.key_weight, u.channels, u.keys);
      u.pack_linear(value, a.parameters.value_weight, u.channels, u.values);
      copy_padded(query_bias, a.parameters.query_bias, u.keys);
      copy_padded(value_bias, a.parameters.value_bias, u.values);
      if (a.parameters.norm.weight)
        norm = {copy_padded(norm_weight, a.parameters.norm.weight, u.channels),
                copy_padded(norm_bias, a.parameters.norm.bias, u.channels), static_cast<T>(a.norm_eps), a.norm_centred};
    }
  };

  // weight [out, in] of a linear layer, packed for tokens times its transpose, or for gradients times itself
  void pack_linear(Element* to, const void* weight, std::int64_t in, std::int64_t out) const {
    pack(engine, a.num_threads, to, static_cast<const T*>(weight), 1, in, in, out);
  }

  struct Tokens {  // of a group of images
    T *x, *query, *key, *value, *attended;
    Tokens(Arena& arena, const Unfolded& u)
        : x(arena.take<T>(u.group_tokens * u.width)),
          query(arena.take<T>(u.group_tokens * u.key_width)),
          key(arena.take<T>(u.group_tokens * u.key_width)),
          value(arena.take<T>(u.group_tokens * u.value_width)),
          attended(arena.take<T>(u.group_tokens * u.value_width)) {}
  };

  template <class Task>
  void for_groups(const Task& task) const {
    for (std::int64_t first = 0; first < a.batch; first += group_images)
      task(first, min_of(group_images, a.batch - first));
  }

  // calls task(batch, token in the image, tokens, token in the group, block), in parallel
  template <class Task>
  void for_image_tokens(std::int64_t first_image, std::int64_t images, const Task& task) const {
    for_tokens_of_images(a.num_threads, first_image, images, a.tokens, task);
  }

  void load_group(const Norm<T>& norm, std::int64_t first_image, std::int64_t images, T* x, T* normalized,
                  T* rstd) const {
    load_images(a.num_threads, a.x, norm, first_image, images, a.tokens, channels, x, normalized, rstd);
  }

  void project(const Weights& w, std::int64_t tokens, const Tokens& t) const {
    const int threads = a.num_threads;
    dense_tokens(engine, threads, tokens, channels, key_width, t.x, width, w.query, w.query_bias, {t.query, key_width});
    dense_tokens(engine, threads, tokens, channels, key_width, t.x, width, w.key, nullptr, {t.key, key_width});
    dense_tokens(engine, threads, tokens, channels, value_width, t.x, width, w.value, w.value_bias,
                 {t.value, value_width});
  }

  // a matrix [tokens, channels] of a group as heads
  Activation heads(T* data, std::int64_t leading, std::int64_t channels_of_all) const {
    return {
        data, sizeof(T) == 8 ? DType::float64 : DType::float32, a.tokens * leading, channels_of_all / a.heads, leading,
        1};
  }

  // the attention of a group of images; context, key_max and key_sum are those of its first image
  AttentionArguments attention(const Tokens& t, std::int64_t first_image, std::int64_t images, void* context,
                               void* key_max, void* key_sum) const {
    AttentionArguments attention{};
    attention.num_threads = a.num_threads;
    // heads are small, and these products few
    attention.precision = a.x.dtype == DType::bfloat16 ? Precision::highest : a.precision;
    attention.batch = images;
    attention.heads = a.heads;
    attention.query_tokens = attention.key_tokens = a.tokens;
    attention.key_channels = keys / a.heads;
    attention.value_channels = values / a.heads;
    attention.query_scale = attention.key_scale = attention.output_scale = 1;
    attention.normalize_query = true;
    attention.normalization = Normalization::softmax;
    attention.query = heads(t.query, key_width, keys);
    attention.key = heads(t.key, key_width, keys);
    attention.value = heads(t.value, value_width, values);
    attention.mask = a.mask;
    attention.memory_tokens = a.memory_tokens;
    attention.memory_key = a.memory_key;
    attention.memory_value = a.memory_value;
    if (a.mask.data) attention.mask.data += first_image * a.mask.batch_stride;
    attention.context = context;
    attention.key_max = key_max;
    attention.key_sum = key_sum;
    attention.output = heads(t.attended, value_width, values);
    return attention;
  }

  // Gradients of the memory tokens: those of one group of images, and of all groups so far.
  struct MemoryGradients {
    const std::int64_t heads, tokens, key_width, value_width;
    T *of_group, *total;  // keys [heads, tokens, key_width], then values likewise
    MemoryGradients(Arena& arena, const Unfolded& u)
        : heads(u.a.heads),
          tokens(u.a.memory_tokens),
          key_width(padded<T>(u.keys / u.a.heads)),
          value_width(padded<T>(u.values / u.a.heads)),
          of_group(arena.take<T>(size())),
          total(arena.take<T>(size())) {}

    std::int64_t size() const { return heads * tokens * (key_width + value_width); }
    Activation keys_of(T* data) const { return in_scratch(data, key_width); }
    Activation values_of(T* data) const { return in_scratch(data + heads * tokens * key_width, value_width); }
    Activation in_scratch(T* data, std::int64_t leading) const {
      return {data, sizeof(T) == 8 ? DType::float64 : DType::float32, 0, tokens * leading, leading, 1};
    }
    void write(const Activation& out, std::int64_t channels, T* from, std::int64_t leading) const {
      for (std::int64_t head = 0; head < heads; ++head)
        store_tokens(out, 0, head, 0, tokens, channels, from + head * tokens * leading, leading);
    }
    void finish(const SelfAttentionArguments& a) const {
      write(a.grad_memory_key, a.key_channels / heads, total, key_width);
      write(a.grad_memory_value, a.value_channels / heads, total + heads * tokens * key_width, value_width);
    }
  };

  std::int64_t context_size() const { return keys * (values / a.heads); }
  static T* at(void* base, std::int64_t offset) { return base ? static_cast<T*>(base) + offset : nullptr; }
  static const T* at(const void* base, std::int64_t offset) {
    return base ? static_cast<const T*>(base) + offset : nullptr;
  }

  struct ForwardBuffers {
    Weights weights;
    Element* output_weight;
    T* output_bias;
    Tokens tokens;
    T* y;
    ForwardBuffers(Arena& arena, const Unfolded& u)
        : weights(arena, u),
          output_weight(arena.take<Element>(u.engine.packed_size(u.values, u.width))),
          output_bias(arena.take<T>(u.width)),
          tokens(arena, u),
          y(arena.take<T>(u.group_tokens * u.width)) {}
  };

  void forward() const {
    Arena counter(nullptr);
    ForwardBuffers(counter, *this);
    Workspace memory(counter.used());
    Arena arena(memory.data());
    ForwardBuffers s(arena, *this);
    s.weights.fill_in(*this);
    pack_linear(s.output_weight, a.parameters.output_weight, values, channels);
    copy_padded(s.output_bias, a.parameters.output_bias, channels);
    fill(static_cast<T*>(a.key_tokens), a.batch * keys * channels, T(0));  // of the folded form; not needed here
    for_groups([&](std::int64_t first, std::int64_t images) {
      const std::int64_t tokens = images * a.tokens;
      load_group(s.weights.norm, first, images, s.tokens.x, nullptr, nullptr);
      project(s.weights, tokens, s.tokens);
      attention_forward(attention(s.tokens, first, images, at(a.context, first * context_size()),
                                  at(a.key_max, first * keys), at(a.key_sum, first * keys)));
      dense_tokens(engine, a.num_threads, tokens, values, width, s.tokens.attended, value_width, s.output_weight,
                   s.output_bias, {s.y, width});
      store_images(a.num_threads, a.output, a.residual ? &a.x : nullptr, first, images, a.tokens, channels, s.tokens.x,
                   s.y);
    });
  }

  struct BackwardBuffers {
    Weights weights;
    RightSide<T> query_weight, key_weight, value_weight, output_weight;  // for gradients of tokens
    WeightGradient<T> query_gradient, key_gradient, value_gradient, output_gradient;
    T *query_bias, *value_bias, *output_bias, *norm_weight, *norm_bias;  // gradients
    Tokens tokens;
    T *normalized, *rstd, *grad_output, *grad_x, *norm_partials;
    T *grad_query, *grad_key, *grad_value, *grad_attended;
    MemoryGradients memory;
    T *context, *key_max, *key_sum;  // of the recomputed forward; the same as the saved ones, which stay as they are
    BackwardBuffers(Arena& arena, const Unfolded& u)
        : weights(arena, u),
          query_weight(arena, u.a.parameters.query_weight, u.keys, u.channels),
          key_weight(arena, u.a.parameters.key_weight, u.keys, u.channels),
          value_weight(arena, u.a.parameters.value_weight, u.values, u.channels),
          output_weight(arena, u.a.parameters.output_weight, u.channels, u.values),
          query_gradient(arena, u.a.gradients.query_weight, u.keys, u.channels),
          key_gradient(arena, u.a.gradients.key_weight, u.keys, u.channels),
          value_gradient(arena, u.a.gradients.value_weight, u.values, u.channels),
          output_gradient(arena, u.a.gradients.output_weight, u.channels, u.values),
          query_bias(arena.take<T>(u.key_width)),
          value_bias(arena.take<T>(u.value_width)),
          output_bias(arena.take<T>(u.width)),
          norm_weight(arena.take<T>(u.width)),
          norm_bias(arena.take<T>(u.width)),
          tokens(arena, u),
          normalized(arena.take<T>(u.group_tokens * u.width)),
          rstd(arena.take<T>(u.group_tokens)),
          grad_output(arena.take<T>(u.group_tokens * u.width)),
          grad_x(arena.take<T>(u.group_tokens * u.width)),
          norm_partials(arena.take<T>(token_blocks(u.group_tokens) * 2 * u.width)),
          grad_query(arena.take<T>(u.group_tokens * u.key_width)),
          grad_key(arena.take<T>(u.group_tokens * u.key_width)),
          grad_value(arena.take<T>(u.group_tokens * u.value_width)),
          grad_attended(arena.take<T>(u.group_tokens * u.value_width)),
          memory(arena, u),
          context(arena.take<T>(u.group_images * u.context_size())),
          key_max(arena.take<T>(u.group_images * u.keys)),
          key_sum(arena.take<T>(u.group_images * u.keys)) {}
  };

  struct RightSides {
    Matrix<T> query, key, value, output;
  };

  void backward_group(const BackwardBuffers& s, const RightSides& w, std::int64_t first, std::int64_t images) const {
    const int threads = a.num_threads;
    const std::int64_t tokens = images * a.tokens;
    const Tokens& t = s.tokens;
    const bool add = first > 0;
    load_group(s.weights.norm, first, images, t.x, s.normalized, s.rstd);
    load_images<T>(threads, a.grad_output, {}, first, images, a.tokens, channels, s.grad_output, nullptr, nullptr);
    project(s.weights, tokens, t);
    attention_forward(attention(t, first, images, s.context, s.key_max, s.key_sum));
    dense(engine, threads, tokens, channels, value_width, {s.grad_output, width, 1}, w.output, Start::zero, nullptr,
          {s.grad_attended, value_width});

    AttentionArguments arguments = attention(t, first, images, s.context, s.key_max, s.key_sum);
    arguments.grad_output = heads(s.grad_attended, value_width, values);
    arguments.grad_context = at(a.grad_context, first * context_size());
    arguments.grad_query = heads(s.grad_query, key_width, keys);
    arguments.grad_key = heads(s.grad_key, key_width, keys);
    arguments.grad_value = heads(s.grad_value, value_width, values);
    if (s.memory.tokens) {
      fill(s.memory.of_group, s.memory.size(), T(0));
      arguments.grad_memory_key = s.memory.keys_of(s.memory.of_group);
      arguments.grad_memory_value = s.memory.values_of(s.memory.of_group);
    }
    attention_backward(arguments);
    add_rows(1, s.memory.size(), s.memory.of_group, s.memory.total);
    set_padding(t.attended, tokens, values, value_width, T(0));
    set_padding(s.grad_query, tokens, keys, key_width, T(0));
    set_padding(s.grad_key, tokens, keys, key_width, T(0));
    set_padding(s.grad_value, tokens, values, value_width, T(0));

    const auto weight = [&](const WeightGradient<T>& w, std::int64_t rows, const T* grad, std::int64_t grad_width,
                            const T* in, std::int64_t in_width) {
      dense_weights(engine, threads, rows, tokens, in_width, grad, grad_width, in, in_width, w.data(), w.leading(),
                    add);
    };
    weight(s.query_gradient, keys, s.grad_query, key_width, t.x, width);
    weight(s.key_gradient, keys, s.grad_key, key_width, t.x, width);
    weight(s.value_gradient, values, s.grad_value, value_width, t.x, width);
    weight(s.output_gradient, channels, s.grad_output, width, t.attended, value_width);
    add_column_sums(tokens, key_width, s.grad_query, key_width, s.query_bias);
    add_column_sums(tokens, value_width, s.grad_value, value_width, s.value_bias);
    add_column_sums(tokens, width, s.grad_output, width, s.output_bias);

    const auto to_x = [&](std::int64_t features, const T* grad, std::int64_t grad_width, const Matrix<T>& weight,
                          Start start) {
      dense(engine, threads, tokens, features, width, {grad, grad_width, 1}, weight, start, nullptr, {s.grad_x, width});
    };
    to_x(keys, s.grad_query, key_width, w.query, Start::zero);
    to_x(keys, s.grad_key, key_width, w.key, Start::output);
    to_x(values, s.grad_value, value_width, w.value, Start::output);
    store_image_gradients(threads, a.grad_x, s.weights.norm, a.residual ? s.grad_output : nullptr, first, images,
                          a.tokens, channels, s.normalized, s.rstd, s.grad_x, s.norm_partials, s.norm_weight,
                          s.norm_bias);
  }

  void backward() const {
    Arena counter(nullptr);
    BackwardBuffers(counter, *this);
    Workspace memory(counter.used());
    Arena arena(memory.data());
    BackwardBuffers s(arena, *this);
    s.weights.fill_in(*this);
    const RightSides right_sides{s.query_weight.fill_in(a.num_threads), s.key_weight.fill_in(a.num_threads),
                                 s.value_weight.fill_in(a.num_threads), s.output_weight.fill_in(a.num_threads)};
    fill(s.query_bias, key_width, T(0));
    fill(s.value_bias, value_width, T(0));
    fill(s.output_bias, width, T(0));
    fill(s.norm_weight, width, T(0));
    fill(s.norm_bias, width, T(0));
    fill(s.memory.total, s.memory.size(), T(0));
    for_groups([&](std::int64_t first, std::int64_t images) { backward_group(s, right_sides, first, images); });
    s.query_gradient.finish();
    s.key_gradient.finish();
    s.value_gradient.finish();
    s.output_gradient.finish();
    copy_out(s.query_bias, keys, a.gradients.query_bias);
    copy_out(s.value_bias, values, a.gradients.value_bias);
    copy_out(s.output_bias, channels, a.gradients.output_bias);
    copy_out(s.norm_weight, channels, a.gradients.norm.weight);
    copy_out(s.norm_bias, channels, a.gradients.norm.bias);
    if (s.memory.tokens) s.memory.finish(a);
  }
};

}  // namespace

bool self_attention_is_better_unfolded(const SelfAttentionArguments& a) {
  const std::int64_t n = a.tokens, c = a.channels, dk = a.key_channels, dv = a.value_channels;
  const std::int64_t unfolded = 4 * n * c * (dk + dv) + 4 * n * dk * dv / a.heads;
  const std::int64_t folded = 8 * n * c * dk + 4 * c * dk * dv / a.heads;
  if (a.batch * n == 0) return false;
  return a.form == Form::by_shape ? unfolded < folded : a.form == Form::few_tokens;
}

void self_attention_unfolded_forward(const SelfAttentionArguments& a) {
  with_engine(a.x.dtype, a.precision, UnfoldedProducts(a).shapes,
              [&](auto engine) { Unfolded<decltype(engine)>(a, engine).forward(); });
}

void self_attention_unfolded_backward(const SelfAttentionArguments& a) {
  with_engine(a.x.dtype, a.precision, UnfoldedProducts(a).shapes,
              [&](auto engine) { Unfolded<decltype(engine)>(a, engine).backward(); });
}

}  // namespace msformer::MSFORMER_VARIANT
