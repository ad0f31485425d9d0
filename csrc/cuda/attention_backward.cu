// Efficient attention on query, key and value, backward. With G the gradient of the output and dC that of the context:
//
//     dP = output_scale G context^T,   dquery = query_scale P (dP - mean),   mean = sum of P dP over the features
//     dC = output_scale P^T G + what comes in,   dvalue = W dC,   dW = value dC^T
//     dkey = key_scale W (dW - delta),   delta = sum of W dW over the tokens = <context, dC> of a feature
//
// where P = rho_q(query) and W = rho_k(key) are made anew. Three kernels: one of the queries, which also makes partial
// sums of dC; their sum; one of the keys and values. Everything of length N is read once and written once. The first
// and the last keep the context, or dC, on the chip; where it does not fit (attention_wide.h does that) dC is a kernel
// of its own, which reads queries and G once more for every 128 features and columns.
#include "attention_reduction.h"
#include "attention_wide.h"

namespace msformer::gpu {
namespace {

template <class T, class E, class S>
struct QueryMemory {
  int context, weights, grad, raw_query, raw_grad, partial, mean, all;
  int context_stride, weights_stride, grad_stride, raw_query_stride, raw_grad_stride;

  BOTH explicit QueryMemory(const AttentionArguments& a) {
    constexpr int SIZE = sizeof(T);
    Carver m;
    context_stride = stride_of_rows<E>(a.value_channels);
    weights_stride = stride_of_columns<E>(a.key_channels);
    grad_stride = stride_of_columns<E>(a.value_channels);
    raw_query_stride = tile_stride<T>(a.key_channels);
    raw_grad_stride = tile_stride<T>(a.value_channels);
    context = m.take(round_up(a.key_channels, 16) * context_stride * 4);
    weights = m.take(S::TOKENS * weights_stride * 4);
    grad = m.take(S::TOKENS * grad_stride * 4);
    raw_query = m.take(S::TOKENS * raw_query_stride * SIZE);
    raw_grad = m.take(S::TOKENS * raw_grad_stride * SIZE);
    partial = m.take(S::COLUMN_UNITS * S::TOKENS * 4);
    mean = m.take(S::TOKENS * 4);
    all = m.used;
  }
};

template <class T, class E, class S>
KERNEL(S::THREADS, S::BLOCKS)
attention_query_kernel(const Attention a) {
  DYNAMIC_SHARED(memory);
  const QueryMemory<T, E, S> m(a.arguments);
  auto floats = [&](int at) { return reinterpret_cast<float*>(memory + at); };
  auto raw = [&](int at) { return reinterpret_cast<T*>(memory + at); };
  float *context = floats(m.context), *weights = floats(m.weights), *grad = floats(m.grad), *mean = floats(m.mean);
  const Share place = Share::of(a, a.arguments.queries, 1);
  const int features = a.arguments.key_channels, columns = a.arguments.value_channels;
  const Rows<T> queries(a.arguments.query, a, place.group), grad_outputs(a.arguments.grad_output, a, place.group),
      grad_queries(a.arguments.grad_query, a, place.group);
  const bool softmax = a.query_softmax();
  const float scale = query_scale(a, place.group), factor = a.arguments.output_scale * scale;
  typename S::template OverTokens<E> grad_context;
  grad_context.clear();
  if (place.first < place.last)
    stage(context, m.context_stride, round_up(features, 16), round_up(columns, 16),
          Parameter{a.arguments.context + place.group * a.matrix(), true}, columns, 0, 0, features, columns,
          S::THREADS);
  auto load = [&](std::int64_t token, int rows) {
    fetch(raw(m.raw_query), m.raw_query_stride, queries, token, 0, rows, features, S::WARPS);
    fetch(raw(m.raw_grad), m.raw_grad_stride, grad_outputs, token, 0, rows, columns, S::WARPS);
  };
  auto prepare = [&](std::int64_t, int rows) {
    weigh_queries(weights, m.weights_stride, raw(m.raw_query), m.raw_query_stride, S::TOKENS, rows, features, scale,
                  softmax, S::WARPS);
    widen(grad, m.grad_stride, raw(m.raw_grad), m.raw_grad_stride, S::TOKENS, columns, S::WARPS,
          [&](int r) { return r < rows; });
  };
  auto work = [&](std::int64_t token, int rows) {
    typename S::template OfTokens<E> grad_weights;
    grad_weights.clear();
    grad_weights.template add<false, true>(grad, m.grad_stride, context, m.context_stride, round_up(columns, 16),
                                           S::TOKENS, features);
    grad_context.template add<true, false>(weights, m.weights_stride, grad, m.grad_stride, S::TOKENS, features,
                                           columns);
    if (softmax) dot_rows<S>(grad_weights, weights, m.weights_stride, features, floats(m.partial));
    __syncthreads();  // until all have multiplied the weights, which make room for the gradient
    if (softmax) {
      if (threadIdx.x < S::TOKENS)
        mean[threadIdx.x] = sum_of_units(floats(m.partial), ceil_div(features, 8 * S::NJ), S::TOKENS, threadIdx.x);
      __syncthreads();
    }
    grad_weights.each([&](int r, int d, float& sum) {
      if (d >= features) return;
      float& x = weights[r * m.weights_stride + d];
      x = (softmax ? x * (sum - mean[r]) : sum) * factor;
    });
    __syncthreads();
    write_rows(grad_queries, token, 0, weights, m.weights_stride, rows, features, S::WARPS);
  };
  walk<S>(place, load, prepare, work);
  float* to = a.partials + (place.group * a.split.count + place.split) * a.matrix();
  grad_context.each([&](int d, int c, float& sum) {
    if (d < features && c < columns) write(to + d * columns + c, sum * a.arguments.output_scale);
  });
}

// A block a feature of a group: the gradient of the context, rounded once as the products of the keys' kernel take it,
// and delta, which that is subtracted from: so rounding errors cancel where one token has nearly all the weight.
template <class E>
KERNEL(COMBINE_THREADS, 1)
attention_combine_gradient_kernel(const Attention a) {
  DYNAMIC_SHARED(memory);
  float* shared = reinterpret_cast<float*>(memory);
  const std::int64_t group = blockIdx.x / a.arguments.key_channels;
  const int feature = static_cast<int>(blockIdx.x % a.arguments.key_channels);
  const std::int64_t row = (group * a.arguments.key_channels + feature) * a.arguments.value_channels;
  float delta = 0;
  for (int first = 0; first < a.arguments.value_channels; first += COMBINE_COLUMNS) {
    float total = sum_of_splits(shared, a, group, feature, first, [](std::int64_t) { return 1.0f; });
    const int c = first + static_cast<int>(threadIdx.x);
    if (threadIdx.x >= COMBINE_COLUMNS || c >= a.arguments.value_channels) continue;
    if (a.arguments.grad_context) total += read(a.arguments.grad_context + row + c);
    total = as_right_operand<E>(total);
    write(a.grad_context + row + c, total);
    delta += total * read(a.arguments.context + row + c);
  }
  delta = warp_sum(delta);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = delta;
  __syncthreads();
  if (threadIdx.x == 0) {
    delta = 0;
    for (int w = 0; w < COMBINE_WARPS; w++) delta += shared[w];
    write(a.delta + group * a.arguments.key_channels + feature, delta);
  }
}

template <class T, class E, class S>
struct KeyMemory {
  int grad_context, weights, value, raw_key, raw_value, kept, softmax, partial, all;
  int context_stride, weights_stride, value_stride, raw_key_stride, raw_value_stride;

  BOTH explicit KeyMemory(const AttentionArguments& a) {
    constexpr int SIZE = sizeof(T);
    Carver m;
    context_stride = stride_of_columns<E>(a.value_channels);
    weights_stride = stride_of_rows<E>(a.key_channels);
    value_stride = stride_of_rows<E>(a.value_channels);
    raw_key_stride = tile_stride<T>(a.key_channels);
    raw_value_stride = tile_stride<T>(a.value_channels);
    grad_context = m.take(round_up(a.key_channels, 16) * context_stride * 4);
    weights = m.take(S::TOKENS * weights_stride * 4);
    value = m.take(S::TOKENS * value_stride * 4);
    raw_key = m.take(S::TOKENS * raw_key_stride * SIZE);
    raw_value = m.take(S::TOKENS * raw_value_stride * SIZE);
    kept = m.take(2 * S::TOKENS);
    softmax = m.take(a.key_channels * static_cast<int>(sizeof(KeySoftmax)));
    partial = m.take(S::TOKENS / 16 * S::SIDE * 4);
    all = m.used;
  }
};

template <class T, class E, class S>
KERNEL(S::THREADS, S::BLOCKS)
attention_key_kernel(const Attention a) {
  DYNAMIC_SHARED(memory);
  const KeyMemory<T, E, S> m(a.arguments);
  auto floats = [&](int at) { return reinterpret_cast<float*>(memory + at); };
  auto raw = [&](int at) { return reinterpret_cast<T*>(memory + at); };
  float *grad_context = floats(m.grad_context), *weights = floats(m.weights), *value = floats(m.value);
  KeySoftmax* softmax = reinterpret_cast<KeySoftmax*>(memory + m.softmax);
  const Share place = Share::of(a, a.arguments.tokens, 1);
  const int features = a.arguments.key_channels, columns = a.arguments.value_channels;
  const Rows<T> keys(a.arguments.key, a, place.group), values(a.arguments.value, a, place.group),
      grad_keys(a.arguments.grad_key, a, place.group), grad_values(a.arguments.grad_value, a, place.group);
  auto kept_of = [&](std::int64_t token) {  // of two tiles in turns
    return reinterpret_cast<bool*>(memory + m.kept) + (token - place.first) / S::TOKENS % 2 * S::TOKENS;
  };
  for (int d = threadIdx.x; d < features; d += S::THREADS) softmax[d] = KeySoftmax(a, place.group, d);
  stage(grad_context, m.context_stride, round_up(features, 16), round_up(columns, 16),
        Parameter{a.grad_context + place.group * a.matrix(), true}, columns, 0, 0, features, columns, S::THREADS);
  auto load = [&](std::int64_t token, int rows) {
    fetch(raw(m.raw_key), m.raw_key_stride, keys, token, 0, rows, features, S::WARPS);
    fetch(raw(m.raw_value), m.raw_value_stride, values, token, 0, rows, columns, S::WARPS);
    fetch_kept(kept_of(token), a, place.group, token, rows, S::TOKENS);
  };
  auto prepare = [&](std::int64_t token, int) {
    const bool* kept = kept_of(token);
    each_value(S::TOKENS, round_up(features, 16), false, S::WARPS, [&](int r, int d) {
      weights[r * m.weights_stride + d] =
          kept[r] && d < features ? softmax[d].weight(a, to_float(raw(m.raw_key)[r * m.raw_key_stride + d])) : 0.0f;
    });
    widen(value, m.value_stride, raw(m.raw_value), m.raw_value_stride, S::TOKENS, columns, S::WARPS,
          [&](int r) { return kept[r]; });
  };
  auto work = [&](std::int64_t token, int rows) {
    const bool* kept = kept_of(token);
    typename S::template OfTokens<E> grad_value, grad_weights;
    grad_value.clear();
    grad_value.template add<false, false>(weights, m.weights_stride, grad_context, m.context_stride,
                                          round_up(features, 16), S::TOKENS, columns);
    grad_weights.clear();
    grad_weights.template add<false, true>(value, m.value_stride, grad_context, m.context_stride, round_up(columns, 16),
                                           S::TOKENS, features);
    const bool one_tile = a.arguments.tokens <= S::TOKENS;  // then delta is of what is here: rounding errors cancel
    if (one_tile) dot_columns<S>(grad_weights, weights, m.weights_stride, features, floats(m.partial));
    __syncthreads();  // until all have multiplied weights and values, which make room for their gradients
    if (one_tile) {
      for (int d = threadIdx.x; d < features; d += S::THREADS)
        softmax[d].delta = sum_of_units(floats(m.partial), S::TOKENS / 16, S::SIDE, d);
      __syncthreads();
    }
    grad_weights.each([&](int r, int d, float& sum) {
      if (d >= features) return;
      float& x = weights[r * m.weights_stride + d];
      x = kept[r] ? softmax[d].gradient(a, x, sum) : 0.0f;
    });
    grad_value.each([&](int r, int c, float& sum) {
      if (c < columns) value[r * m.value_stride + c] = kept[r] ? sum : 0.0f;
    });
    __syncthreads();
    write_rows(grad_keys, token, 0, weights, m.weights_stride, rows, features, S::WARPS);
    write_rows(grad_values, token, 0, value, m.value_stride, rows, columns, S::WARPS);
  };
  walk<S>(place, load, prepare, work);
}

// Whether a group's context fits on the chip beside the tiles of the queries, and of the keys.
template <class T, class E, class S>
bool queries_fit(const AttentionArguments& a) {
  return a.key_channels <= S::SIDE && a.value_channels <= S::SIDE && QueryMemory<T, E, S>(a).all <= most_shared();
}
template <class T, class E, class S>
bool keys_fit(const AttentionArguments& a) {
  return a.key_channels <= S::SIDE && a.value_channels <= S::SIDE && KeyMemory<T, E, S>(a).all <= most_shared();
}

template <class T, class E, class S>
Attention plan(const AttentionArguments& arguments, Scratch& scratch) {
  Attention a{};
  a.arguments = arguments;
  a.split = split_reduction<S>(arguments, arguments.queries);
  a.partials = scratch.take<float>(a.groups() * a.split.count * a.matrix());
  a.grad_context = scratch.take<float>(a.groups() * a.matrix());
  a.delta = scratch.take<float>(a.groups() * arguments.key_channels);
  if (!queries_fit<T, E, S>(arguments)) {
    a.shift = scratch.take<float>(a.groups() * arguments.queries);
    a.factor = scratch.take<float>(a.groups() * arguments.queries);
  }
  return a;
}

template <class T, class E, class S>
int of_queries(const Attention& a, void* stream) {
  if (queries_fit<T, E, S>(a.arguments))
    return launch<attention_query_kernel<T, E, S>>(grid_of(a), S::THREADS, QueryMemory<T, E, S>(a.arguments).all,
                                                   stream, a);
  Attention wide = a;
  wide.split = split_wide(a.arguments.queries);
  const int error =
      launch<attention_wide_query_kernel<T, E>>(grid_of(wide), Wide::THREADS, WideMemory().all, stream, wide);
  return error ? error : reduce<T, E, S, false>(a, stream);
}

template <class T, class E, class S>
int of_keys(Attention a, void* stream) {
  if (a.arguments.tokens == 0) return 0;
  if (keys_fit<T, E, S>(a.arguments)) {
    a.split = split_tokens(a.arguments.tokens, S::TOKENS, a.groups(), 2 * S::BLOCKS * processors());
    return launch<attention_key_kernel<T, E, S>>(grid_of(a), S::THREADS, KeyMemory<T, E, S>(a.arguments).all, stream,
                                                 a);
  }
  a.split = split_wide(a.arguments.tokens);
  const int tiles = ceil_div(a.arguments.key_channels, Wide::SIDE) + ceil_div(a.arguments.value_channels, Wide::SIDE);
  return launch<attention_wide_key_kernel<T, E>>(grid_of(a, tiles), Wide::THREADS, WideMemory().all, stream, a);
}

template <class T, class E, class S>
int backward(const AttentionArguments& arguments, void* stream) {
  Scratch scratch{static_cast<char*>(arguments.scratch)};
  const Attention a = plan<T, E, S>(arguments, scratch);
  if (const int error = of_queries<T, E, S>(a, stream)) return error;
  const dim3 grid(static_cast<unsigned>(a.groups() * arguments.key_channels));
  if (const int error = launch<attention_combine_gradient_kernel<E>>(grid, COMBINE_THREADS, COMBINE_MEMORY, stream, a))
    return error;
  return of_keys<T, E, S>(a, stream);
}

}  // namespace

int attention_backward(Engine engine, const AttentionArguments& arguments, void* stream) {
  return with_shape(arguments, [&](auto shape) {
    return with_products<false>(
        engine, [&](auto t, auto e) { return backward<decltype(t), decltype(e), decltype(shape)>(arguments, stream); });
  });
}

std::int64_t attention_backward_scratch(Engine engine, const AttentionArguments& arguments) {
  return with_shape(arguments, [&](auto shape) {
    Scratch scratch{nullptr};
    with_products<false>(engine, [&](auto t, auto e) {
      plan<decltype(t), decltype(e), decltype(shape)>(arguments, scratch);
      return 0;
    });
    return scratch.used;
  });
}

}  // namespace msformer::gpu
