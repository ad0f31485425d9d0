// Efficient attention on query, key and value, forward, in three kernels: partial sums of the context (keys and values
// are read once, or once for every 128 of the other's features), their sum, and the output (queries are read once and
// the output is written). The output's kernel keeps the context of a group on the chip while it walks over the queries.
#include "attention_reduction.h"
#include "attention_wide.h"

namespace msformer::gpu {
namespace {

// A block a feature of a group: the context, and maximum and sum of the key softmax. Without softmax the maximum is 0
// and the sum the square root of the number of tokens.
KERNEL(COMBINE_THREADS, 1)
attention_combine_kernel(const Attention a) {
  DYNAMIC_SHARED(memory);
  const std::int64_t group = blockIdx.x / a.arguments.key_channels;
  const int feature = static_cast<int>(blockIdx.x % a.arguments.key_channels), lane = threadIdx.x % 32;
  const std::int64_t splits = group * a.split.count;
  auto at = [&](std::int64_t k) { return (splits + k) * a.arguments.key_channels + feature; };
  float largest = -INFINITY, sum = 0;
  std::int64_t count = 0;
  for (std::int64_t k = lane; k < a.split.count; k += 32) {
    largest = max(largest, read(a.maxima + at(k)));
    count += read(a.counts + splits + k);
  }
  largest = warp_max(largest);
  count = warp_sum(count);
  const float shift = largest == -INFINITY ? 0.0f : largest;
  for (std::int64_t k = lane; k < a.split.count; k += 32)
    sum += read(a.sums + at(k)) * expf(read(a.maxima + at(k)) - shift);
  sum = warp_sum(sum);
  if (!a.arguments.softmax)
    sum = sqrtf(static_cast<float>(count));
  else if (sum == 0 && count > 0)
    sum = NAN;  // every logit is -infinity
  const std::int64_t row = group * a.arguments.key_channels + feature;
  if (threadIdx.x == 0) {
    write(a.arguments.key_max + row, largest);
    write(a.arguments.key_sum + row, sum);
  }
  const float factor = 1 / (sum == 0 ? 1.0f : sum);
  for (int first = 0; first < a.arguments.value_channels; first += COMBINE_COLUMNS) {
    const float total = sum_of_splits(reinterpret_cast<float*>(memory), a, group, feature, first,
                                      [&](std::int64_t k) { return expf(read(a.maxima + at(k)) - shift); });
    const int c = first + static_cast<int>(threadIdx.x);
    if (threadIdx.x < COMBINE_COLUMNS && c < a.arguments.value_channels)
      write(a.arguments.context + row * a.arguments.value_channels + c, total * factor);
  }
}

template <class T, class E, class S>
struct OutputMemory {
  int context, weights, raw, all, context_stride, stride, raw_stride;

  BOTH explicit OutputMemory(const AttentionArguments& a) {
    Carver m;
    const int columns = min(S::SIDE, a.value_channels);
    context_stride = stride_of_columns<E>(columns);
    stride = stride_of_rows<E>(max(a.key_channels, columns));  // weights, later the output
    raw_stride = tile_stride<T>(a.key_channels);
    context = m.take(round_up(a.key_channels, 16) * context_stride * 4);
    weights = m.take(S::TOKENS * stride * 4);
    raw = m.take(S::TOKENS * raw_stride * static_cast<int>(sizeof(T)));
    all = m.used;
  }
};

template <class T, class E, class S>
KERNEL(S::THREADS, S::BLOCKS)
attention_output_kernel(const Attention a) {
  DYNAMIC_SHARED(memory);
  const OutputMemory<T, E, S> m(a.arguments);
  float *context = reinterpret_cast<float*>(memory + m.context),
        *weights = reinterpret_cast<float*>(memory + m.weights);
  T* raw = reinterpret_cast<T*>(memory + m.raw);
  const Share place = Share::of(a, a.arguments.queries, ceil_div(a.arguments.value_channels, S::SIDE));
  const int column = place.tile * S::SIDE, columns = min(S::SIDE, a.arguments.value_channels - column);
  const int features = a.arguments.key_channels, inner = round_up(features, 16);
  const Rows<T> queries(a.arguments.query, a, place.group), outputs(a.arguments.output, a, place.group);
  const float scale = query_scale(a, place.group);
  stage(context, m.context_stride, inner, round_up(columns, 16),
        Parameter{a.arguments.context + place.group * a.matrix(), true}, a.arguments.value_channels, 0, column,
        features, columns, S::THREADS);
  auto load = [&](std::int64_t token, int rows) {
    fetch(raw, m.raw_stride, queries, token, 0, rows, features, S::WARPS);
  };
  auto prepare = [&](std::int64_t, int rows) {
    weigh_queries(weights, m.stride, raw, m.raw_stride, S::TOKENS, rows, features, scale, a.query_softmax(), S::WARPS);
  };
  auto work = [&](std::int64_t token, int rows) {
    typename S::template OfTokens<E> output;
    output.clear();
    output.template add<false, false>(weights, m.stride, context, m.context_stride, inner, S::TOKENS, columns);
    __syncthreads();  // until all have multiplied the weights
    output.each([&](int r, int c, float& sum) {
      if (c < columns) weights[r * m.stride + c] = sum * a.arguments.output_scale;
    });
    __syncthreads();
    write_rows(outputs, token, column, weights, m.stride, rows, columns, S::WARPS);
  };
  walk<S>(place, load, prepare, work);
}

template <class S>
Attention plan(const AttentionArguments& arguments, Scratch& scratch) {
  Attention a{};
  a.arguments = arguments;
  a.split = split_reduction<S>(arguments, arguments.tokens);
  const std::int64_t splits = a.groups() * a.split.count;
  a.maxima = scratch.take<float>(splits * arguments.key_channels);
  a.sums = scratch.take<float>(splits * arguments.key_channels);
  a.counts = scratch.take<int>(splits);
  a.partials = scratch.take<float>(splits * a.matrix());
  return a;
}

int make_context(Engine engine, const AttentionArguments& arguments, void* stream) {
  return with_shape(arguments, [&](auto shape) {
    using S = decltype(shape);
    Scratch scratch{static_cast<char*>(arguments.scratch)};
    const Attention a = plan<S>(arguments, scratch);
    const int error = with_products<true>(
        engine, [&](auto t, auto e) { return reduce<decltype(t), decltype(e), S, true>(a, stream); });
    if (error) return error;
    const dim3 grid(static_cast<unsigned>(a.groups() * arguments.key_channels));
    return launch<attention_combine_kernel>(grid, COMBINE_THREADS, COMBINE_MEMORY, stream, a);
  });
}

template <class T, class E, class S>
int make_output(const AttentionArguments& arguments, void* stream) {
  Attention a{};
  a.arguments = arguments;
  const OutputMemory<T, E, S> m(arguments);
  if (arguments.queries == 0) return 0;
  if (m.all > most_shared()) {
    a.split = split_wide(arguments.queries);
    return launch<attention_wide_output_kernel<T, E>>(grid_of(a, ceil_div(arguments.value_channels, Wide::SIDE)),
                                                      Wide::THREADS, WideMemory().all, stream, a);
  }
  const int tiles = ceil_div(arguments.value_channels, S::SIDE);
  a.split = split_tokens(arguments.queries, S::TOKENS, a.groups() * tiles, 2 * S::BLOCKS * processors());
  return launch<attention_output_kernel<T, E, S>>(grid_of(a, tiles), S::THREADS, m.all, stream, a);
}

}  // namespace

int attention_output(Engine engine, const AttentionArguments& arguments, void* stream) {
  return with_shape(arguments, [&](auto shape) {
    return with_products<false>(engine, [&](auto t, auto e) {
      return make_output<decltype(t), decltype(e), decltype(shape)>(arguments, stream);
    });
  });
}

int attention_forward(Engine engine, const AttentionArguments& arguments, void* stream) {
  const int error = make_context(engine, arguments, stream);
  return error ? error : attention_output(engine, arguments, stream);
}

std::int64_t attention_forward_scratch(Engine, const AttentionArguments& arguments) {
  return with_shape(arguments, [&](auto shape) {
    Scratch scratch{nullptr};
    plan<decltype(shape)>(arguments, scratch);
    return scratch.used;
  });
}

}  // namespace msformer::gpu
