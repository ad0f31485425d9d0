// Efficient self-attention without folding, forward and backward, for images with fewer tokens than channels.
//
// Folding multiplies the context into the output projection, Dk x Dv x C flop an image and head, to save the value and
// output projections of every token. With few tokens that is the larger number, so here the published form is computed:
// queries, keys and values of a group of images as whole matrices, all threads on one product at a time (dense.h), and
// the attention of the heads by the kernels of attention.cpp. The bias of the keys has no effect and is left out.
//
// Nearly all of the time goes into the products with weights, so the backward makes none of the forward's again: the op
// keeps queries, keys, values and what was attended, side by side in one row a token, each in whole blocks of 16
// values.
#include "../attention/attention.h"
#include "../attention/softmax.h"
#include "../engine/weight_rows.h"
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

  // whether the forward multiplies weights where they lie
  const bool by_rows =
      fits_by_rows(a.parameters.query_weight, channels) && fits_by_rows(a.parameters.key_weight, channels) &&
      fits_by_rows(a.parameters.value_weight, channels) && fits_by_rows(a.parameters.output_weight, values);

  Unfolded(const SelfAttentionArguments& arguments, const E& engine_) : a(arguments), engine(engine_) {}

  bool fits_by_rows(const void* weight, std::int64_t in) const {
    return WeightRows<E>::fit({weight, a.matrix_dtype}, group_tokens, in);
  }

  // weights packed for products with tokens, unless these multiply them where they lie; and biases padded
  struct Weights {
    Element *query, *key, *value, *output;
    T *query_bias, *value_bias, *output_bias;
    Weights(Arena& arena, const Unfolded& u)
        : query(u.room_for_linear(arena, u.channels, u.keys)),
          key(u.room_for_linear(arena, u.channels, u.keys)),
          value(u.room_for_linear(arena, u.channels, u.values)),
          output(u.room_for_linear(arena, u.values, u.channels)),
          query_bias(arena.take<T>(u.key_width)),
          value_bias(arena.take<T>(u.value_width)),
          output_bias(arena.take<T>(u.width)) {}

    void fill_in(const Unfolded& u) {
      const SelfAttentionParameters<const void*>& p = u.a.parameters;
      copy_padded(query_bias, p.query_bias, u.keys);
      copy_padded(value_bias, p.value_bias, u.values);
      copy_padded(output_bias, p.output_bias, u.channels);
      if (u.by_rows) return;
      u.pack_linear(query, p.query_weight, u.channels, u.keys);
      u.pack_linear(key, p.key_weight, u.channels, u.keys);
      u.pack_linear(value, p.value_weight, u.channels, u.values);
      u.pack_linear(output, p.output_weight, u.values, u.channels);
    }
  };

  Element* room_for_linear(Arena& arena, std::int64_t in, std::int64_t out) const {
    return arena.take<Element>(by_rows ? 0 : engine.packed_size(in, padded<T>(out)));
  }

  // weight [out, in] of a linear layer, packed for tokens times its transpose
  void pack_linear(Element* to, const void* weight, std::int64_t in, std::int64_t out) const {
    pack(engine, a.num_threads, to, WeightMatrix{weight, a.matrix_dtype}, 1, in, in, out);
  }

  RightSide<E> right_side(Arena& arena, const void* weight, std::int64_t out, std::int64_t in) const {
    return RightSide<E>(arena, engine, {weight, a.matrix_dtype}, out, in);
  }

  // what the op keeps of a group of images
  struct Projected {
    T *query, *key, *value, *attended;
    std::int64_t leading;
  };

  Projected projected(std::int64_t first_image) const {
    constexpr std::int64_t kBlock = 16;
    const std::int64_t of_keys = (keys + kBlock - 1) / kBlock * kBlock, leading = a.projected.token_stride;
    const std::int64_t of_values = (values + kBlock - 1) / kBlock * kBlock;
    T* query = static_cast<T*>(a.projected.data) + first_image * a.tokens * leading;
    T *key = query + of_keys, *value = key + of_keys;
    return {query, key, value, value + of_values, leading};
  }

  template <class Task>
  void for_groups(const Task& task) const {
    for (std::int64_t first = 0; first < a.batch; first += group_images)
      task(first, min_of(group_images, a.batch - first));
  }

  void project(const Weights& w, std::int64_t tokens, const T* x, Element* memory, const Projected& p) const {
    const int threads = a.num_threads;
    if (by_rows) {
      const SelfAttentionParameters<const void*>& given = a.parameters;
      const typename E::Right turned = WeightRows<E>::turn(engine, threads, memory, tokens, channels, x, width);
      const auto linear = [&](std::int64_t features, const void* weight, const T* bias, T* to) {
        WeightRows<E>::multiply(engine, threads, tokens, channels, features, turned, weight, bias, {to, p.leading});
      };
      linear(keys, given.query_weight, w.query_bias, p.query);
      linear(keys, given.key_weight, nullptr, p.key);
      linear(values, given.value_weight, w.value_bias, p.value);
      return;
    }
    const typename E::Left rows = engine.make_left(threads, memory, tokens, channels, {x, width, 1});
    const auto linear = [&](std::int64_t features, const Element* weight, const T* bias, T* to) {
      product(engine, threads, tokens, channels, features, rows, engine.packed_right(weight),
              bias ? Start::bias : Start::zero, bias, {to, p.leading});
    };
    linear(key_width, w.query, w.query_bias, p.query);
    linear(key_width, w.key, nullptr, p.key);
    linear(value_width, w.value, w.value_bias, p.value);
  }

  void project_output(const Weights& w, std::int64_t tokens, const Projected& p, Element* memory, T* y) const {
    if (by_rows)
      return WeightRows<E>::multiply(
          engine, a.num_threads, tokens, values, channels,
          WeightRows<E>::turn(engine, a.num_threads, memory, tokens, values, p.attended, p.leading),
          a.parameters.output_weight, w.output_bias, {y, width});
    dense_rows(engine, a.num_threads, tokens, values, width, p.attended, p.leading, engine.packed_right(w.output),
               Start::bias, w.output_bias, {y, width});
  }

  void clear_padding(const Projected& p, std::int64_t tokens) const {
    const auto clear = [&](T* begin, T* end) {
      for (std::int64_t i = 0; i < tokens && begin < end; ++i) fill(begin + i * p.leading, end - begin, T(0));
    };
    clear(p.query + keys, p.key);
    clear(p.key + keys, p.value);
    clear(p.value + values, p.attended);
    clear(p.attended + values, p.query + p.leading);
  }

  // a matrix [tokens, channels] of a group as heads
  Activation heads(T* data, std::int64_t leading, std::int64_t channels_of_all) const {
    return {
        data, sizeof(T) == 8 ? DType::float64 : DType::float32, a.tokens * leading, channels_of_all / a.heads, leading,
        1};
  }

  // the attention of a group of images
  AttentionArguments attention(std::int64_t first_image, std::int64_t images) const {
    const Projected p = projected(first_image);
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
    attention.query = heads(p.query, p.leading, keys);
    attention.key = heads(p.key, p.leading, keys);
    attention.value = heads(p.value, p.leading, values);
    attention.mask = a.mask;
    attention.memory_tokens = a.memory_tokens;
    attention.memory_key = a.memory_key;
    attention.memory_value = a.memory_value;
    if (a.mask.data) attention.mask.data += first_image * a.mask.batch_stride;
    attention.context = at(a.context, first_image * keys * (values / a.heads));
    attention.key_max = at(a.key_max, first_image * keys);
    attention.key_sum = at(a.key_sum, first_image * keys);
    attention.output = heads(p.attended, p.leading, values);
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

  static T* at(void* base, std::int64_t offset) { return base ? static_cast<T*>(base) + offset : nullptr; }
  static const T* at(const void* base, std::int64_t offset) {
    return base ? static_cast<const T*>(base) + offset : nullptr;
  }

  struct ForwardBuffers {
    TokenNorm<T> norm;
    Weights weights;
    Element* operand;  // made of tokens
    T *x, *y;
    ForwardBuffers(Arena& arena, const Unfolded& u)
        : norm(arena, u.channels),
          weights(arena, u),
          operand(arena.take<Element>(u.operand_size())),
          x(arena.take<T>(u.group_tokens * u.width)),
          y(arena.take<T>(u.group_tokens * u.width)) {}
  };

  std::int64_t operand_size() const {
    if (!by_rows) return engine.left_size(group_tokens, channels);
    return max_of(WeightRows<E>::size(engine, group_tokens, channels),
                  WeightRows<E>::size(engine, group_tokens, values));
  }

  void forward() const {
    Arena counter(nullptr);
    ForwardBuffers(counter, *this);
    Workspace memory(counter.used());
    Arena arena(memory.data());
    ForwardBuffers s(arena, *this);
    s.norm.fill_in(a.parameters.norm, channels, a.norm_eps, a.norm_centred);
    s.weights.fill_in(*this);
    for_groups([&](std::int64_t first, std::int64_t images) {
      const std::int64_t tokens = images * a.tokens;
      const Projected p = projected(first);
      load_images<T>(a.num_threads, a.x, s.norm.norm, first, images, a.tokens, channels, s.x, nullptr, nullptr);
      project(s.weights, tokens, s.x, s.operand, p);
      attention_forward(attention(first, images));
      clear_padding(p, tokens);
      project_output(s.weights, tokens, p, s.operand, s.y);
      store_images(a.num_threads, a.output, a.residual ? &a.x : nullptr, first, images, a.tokens, channels, s.x, s.y);
    });
  }

  struct BackwardBuffers {
    TokenNorm<T> norm;
    RightSide<E> query_weight, key_weight, value_weight, output_weight;  // for gradients of tokens
    SharedOperand<E> x_right;
    WeightGradient<T> query_gradient, key_gradient, value_gradient, output_gradient;
    T *query_bias, *value_bias, *output_bias, *norm_weight, *norm_bias;  // gradients
    T *x, *normalized, *rstd, *grad_output, *grad_x, *norm_partials;
    T *grad_query, *grad_key, *grad_value, *grad_attended;
    MemoryGradients memory;
    BackwardBuffers(Arena& arena, const Unfolded& u)
        : norm(arena, u.channels),
          query_weight(u.right_side(arena, u.a.parameters.query_weight, u.keys, u.channels)),
          key_weight(u.right_side(arena, u.a.parameters.key_weight, u.keys, u.channels)),
          value_weight(u.right_side(arena, u.a.parameters.value_weight, u.values, u.channels)),
          output_weight(u.right_side(arena, u.a.parameters.output_weight, u.channels, u.values)),
          x_right(arena, u.engine.right_size(u.group_tokens, u.width)),
          query_gradient(arena, u.a.gradients.query_weight, u.a.matrix_dtype, u.keys, u.channels),
          key_gradient(arena, u.a.gradients.key_weight, u.a.matrix_dtype, u.keys, u.channels),
          value_gradient(arena, u.a.gradients.value_weight, u.a.matrix_dtype, u.values, u.channels),
          output_gradient(arena, u.a.gradients.output_weight, u.a.matrix_dtype, u.channels, u.values),
          query_bias(arena.take<T>(u.key_width)),
          value_bias(arena.take<T>(u.value_width)),
          output_bias(arena.take<T>(u.width)),
          norm_weight(arena.take<T>(u.width)),
          norm_bias(arena.take<T>(u.width)),
          x(arena.take<T>(u.group_tokens * u.width)),
          normalized(arena.take<T>(u.group_tokens * u.width)),
          rstd(arena.take<T>(u.group_tokens)),
          grad_output(arena.take<T>(u.group_tokens * u.width)),
          grad_x(arena.take<T>(u.group_tokens * u.width)),
          norm_partials(arena.take<T>(token_blocks(u.group_tokens) * 2 * u.width)),
          grad_query(arena.take<T>(u.group_tokens * u.key_width)),
          grad_key(arena.take<T>(u.group_tokens * u.key_width)),
          grad_value(arena.take<T>(u.group_tokens * u.value_width)),
          grad_attended(arena.take<T>(u.group_tokens * u.value_width)),
          memory(arena, u) {}
  };

  void backward_group(const BackwardBuffers& s, std::int64_t first, std::int64_t images) const {
    const int threads = a.num_threads;
    const std::int64_t tokens = images * a.tokens;
    const Projected p = projected(first);
    const bool add = first > 0;
    load_images(threads, a.x, s.norm.norm, first, images, a.tokens, channels, s.x, s.normalized, s.rstd);
    load_images<T>(threads, a.grad_output, {}, first, images, a.tokens, channels, s.grad_output, nullptr, nullptr);
    dense_rows(engine, threads, tokens, channels, value_width, s.grad_output, width, s.output_weight.operand(),
               Start::zero, nullptr, {s.grad_attended, value_width});

    AttentionArguments arguments = attention(first, images);
    arguments.grad_output = heads(s.grad_attended, value_width, values);
    arguments.grad_context = at(a.grad_context, first * keys * (values / a.heads));
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
    set_padding(s.grad_query, tokens, keys, key_width, T(0));
    set_padding(s.grad_key, tokens, keys, key_width, T(0));
    set_padding(s.grad_value, tokens, values, value_width, T(0));

    const typename E::Right x = s.x_right.right(engine, threads, tokens, width, s.x, width);
    const auto of_x = [&](const WeightGradient<T>& w, std::int64_t rows, const T* grad, std::int64_t grad_width) {
      dense_columns(engine, threads, rows, tokens, width, grad, grad_width, x, {w.data(), w.leading()}, add);
    };
    of_x(s.query_gradient, keys, s.grad_query, key_width);
    of_x(s.key_gradient, keys, s.grad_key, key_width);
    of_x(s.value_gradient, values, s.grad_value, value_width);
    dense(engine, threads, channels, tokens, value_width, {s.grad_output, 1, width}, {p.attended, p.leading},
          add ? Start::output : Start::zero, nullptr, {s.output_gradient.data(), s.output_gradient.leading()});
    add_column_sums(tokens, key_width, s.grad_query, key_width, s.query_bias);
    add_column_sums(tokens, value_width, s.grad_value, value_width, s.value_bias);
    add_column_sums(tokens, width, s.grad_output, width, s.output_bias);

    const auto to_x = [&](std::int64_t features, const T* grad, std::int64_t grad_width, const RightSide<E>& weight,
                          Start start) {
      dense_rows(engine, threads, tokens, features, width, grad, grad_width, weight.operand(), start, nullptr,
                 {s.grad_x, width});
    };
    to_x(keys, s.grad_query, key_width, s.query_weight, Start::zero);
    to_x(keys, s.grad_key, key_width, s.key_weight, Start::output);
    to_x(values, s.grad_value, value_width, s.value_weight, Start::output);
    store_image_gradients(threads, a.grad_x, s.norm.norm, a.residual ? s.grad_output : nullptr, first, images, a.tokens,
                          channels, s.normalized, s.rstd, s.grad_x, s.norm_partials, s.norm_weight, s.norm_bias);
  }

  void backward() const {
    Arena counter(nullptr);
    BackwardBuffers(counter, *this);
    Workspace memory(counter.used());
    Arena arena(memory.data());
    BackwardBuffers s(arena, *this);
    s.norm.fill_in(a.parameters.norm, channels, a.norm_eps, a.norm_centred);
    for (const RightSide<E>* weight : {&s.query_weight, &s.key_weight, &s.value_weight, &s.output_weight})
      weight->fill_in(a.num_threads);
    fill(s.query_bias, key_width, T(0));
    fill(s.value_bias, value_width, T(0));
    fill(s.output_bias, width, T(0));
    fill(s.norm_weight, width, T(0));
    fill(s.norm_bias, width, T(0));
    fill(s.memory.total, s.memory.size(), T(0));
    for_groups([&](std::int64_t first, std::int64_t images) { backward_group(s, first, images); });
    s.query_gradient.finish(a.num_threads);
    s.key_gradient.finish(a.num_threads);
    s.value_gradient.finish(a.num_threads);
    s.output_gradient.finish(a.num_threads);
    copy_out(s.query_bias, keys, a.gradients.query_bias);
    copy_out(s.value_bias, values, a.gradients.value_bias);
    copy_out(s.output_bias, channels, a.gradients.output_bias);
    copy_out(s.norm_weight, channels, a.gradients.norm.weight);
    copy_out(s.norm_bias, channels, a.gradients.norm.bias);
    if (s.memory.tokens) s.memory.finish(a);
  }
};

}  // namespace

void self_attention_unfolded_forward(const SelfAttentionArguments& a) {
  with_engine(a.x.dtype, a.precision, UnfoldedProducts(a).shapes,
              [&](auto engine) { Unfolded<decltype(engine)>(a, engine).forward(); });
}

void self_attention_unfolded_backward(const SelfAttentionArguments& a) {
  with_engine(a.x.dtype, a.precision, UnfoldedProducts(a).shapes,
              [&](auto engine) { Unfolded<decltype(engine)>(a, engine).backward(); });
}

}  // namespace msformer::MSFORMER_VARIANT
