// Efficient attention where context or gradients do not fit on the chip as a whole: more features than a block takes,
// or a GPU with little shared memory. A block makes one tile of tokens x 64 features or columns; what it sums over
// comes in chunks of 64. Nothing but values that are small in every way is kept between the chunks.
#pragma once

#include "attention.h"

namespace msformer::gpu {

using Wide = Shape<64>;
constexpr int WIDE_STRIDE = Wide::SIDE + 8, WIDE_TILE = Wide::TOKENS * WIDE_STRIDE;

struct WideMemory {
  int left, matrix, shift, factor, mean, partial, all;

  BOTH WideMemory() {
    Carver m;
    left = m.take(WIDE_TILE * 4);
    matrix = m.take(Wide::SIDE * WIDE_STRIDE * 4);
    shift = m.take(Wide::TOKENS * 4);
    factor = m.take(Wide::TOKENS * 4);
    mean = m.take(Wide::TOKENS * 4);
    partial = m.take(Wide::COLUMN_UNITS * Wide::TOKENS * 4);
    all = m.used;
  }
};

// The memory of a block, by its parts.
struct WideTiles {
  float *left, *matrix, *shift, *factor, *mean, *partial;

  DEV explicit WideTiles(unsigned char* memory) {
    const WideMemory m;
    auto floats = [&](int at) { return reinterpret_cast<float*>(memory + at); };
    left = floats(m.left), matrix = floats(m.matrix), shift = floats(m.shift), factor = floats(m.factor);
    mean = floats(m.mean), partial = floats(m.partial);
  }
};

// product += left matrix for `columns` columns from `column` on, over all of `inner`; or left matrix^T (TRANSPOSED).
// left(token, k) gives values, `matrix` is [Dk, Dv] of a group. All threads of the block wait here.
template <bool TRANSPOSED, class P, class Left>
DEV void multiply_chunks(P& product, const WideTiles& tiles, const float* matrix, int pitch, int column, int columns,
                         int inner, bool down, Left left) {
  for (int first = 0; first < inner; first += Wide::SIDE) {
    const int count = min(Wide::SIDE, inner - first), wide = round_up(count, 16);
    each_value(Wide::TOKENS, wide, down, Wide::WARPS,
               [&](int r, int k) { tiles.left[r * WIDE_STRIDE + k] = k < count ? left(r, first + k) : 0.0f; });
    const Parameter from{matrix, true};
    if constexpr (TRANSPOSED)
      stage(tiles.matrix, WIDE_STRIDE, round_up(columns, 16), wide, from, pitch, column, first, columns, count,
            Wide::THREADS);
    else
      stage(tiles.matrix, WIDE_STRIDE, wide, round_up(columns, 16), from, pitch, first, column, count, columns,
            Wide::THREADS);
    commit();
    wait<0>();
    __syncthreads();
    product.template add<false, TRANSPOSED>(tiles.left, WIDE_STRIDE, tiles.matrix, WIDE_STRIDE, wide, Wide::TOKENS,
                                            columns);
    __syncthreads();
  }
}

// The softmax of a tile's queries, or the scale in its place. To be read after a barrier.
template <class T>
DEV void wide_query_softmax(const Attention& a, const WideTiles& tiles, const Rows<T>& queries, std::int64_t token,
                            int rows, float scale) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int r = warp; r < rows; r += Wide::WARPS) {
    QuerySoftmax found{0, scale};
    if (a.query_softmax())
      found = query_softmax(
          a.arguments.key_channels, scale, [&](int d) { return to_float(read(queries.at(token + r, d))); },
          [](int, float) {});
    if (lane == 0) {
      tiles.shift[r] = found.shift;
      tiles.factor[r] = found.factor;
    }
  }
}

template <class T>
DEV float wide_query_weight(const Attention& a, const WideTiles& tiles, const Rows<T>& queries, std::int64_t token,
                            int r, int d, float scale) {
  const float x = to_float(read(queries.at(token + r, d)));
  return (a.query_softmax() ? expf(multiply(x, scale) - tiles.shift[r]) : x) * tiles.factor[r];
}

template <class T, class E>
KERNEL(Wide::THREADS, Wide::BLOCKS)
attention_wide_output_kernel(const Attention a) {
  DYNAMIC_SHARED(memory);
  const WideTiles tiles(memory);
  const Share place = Share::of(a, a.arguments.queries, ceil_div(a.arguments.value_channels, Wide::SIDE));
  const int rows = static_cast<int>(place.last - place.first), column = place.tile * Wide::SIDE;
  const int columns = min(Wide::SIDE, a.arguments.value_channels - column);
  const Rows<T> queries(a.arguments.query, a, place.group), outputs(a.arguments.output, a, place.group);
  const float scale = query_scale(a, place.group);
  wide_query_softmax(a, tiles, queries, place.first, rows, scale);
  __syncthreads();
  typename Wide::OfTokens<E> output;
  output.clear();
  multiply_chunks<false>(output, tiles, a.arguments.context + place.group * a.matrix(), a.arguments.value_channels,
                         column, columns, a.arguments.key_channels, queries.along_tokens(), [&](int r, int d) {
                           return r < rows ? wide_query_weight(a, tiles, queries, place.first, r, d, scale) : 0.0f;
                         });
  output.each([&](int r, int c, float& sum) {
    if (r < rows && c < columns)
      write(outputs.at(place.first + r, column + c), from_float<T>(sum * a.arguments.output_scale));
  });
}

// The gradient of the queries, and their softmax for the reduction. Features are walked over twice: for the mean of the
// gradients of a query's weights under these weights, and to write.
template <class T, class E>
KERNEL(Wide::THREADS, Wide::BLOCKS)
attention_wide_query_kernel(const Attention a) {
  DYNAMIC_SHARED(memory);
  const WideTiles tiles(memory);
  const Share place = Share::of(a, a.arguments.queries, 1);
  const int rows = static_cast<int>(place.last - place.first);
  const Rows<T> queries(a.arguments.query, a, place.group), grad_outputs(a.arguments.grad_output, a, place.group),
      grad_queries(a.arguments.grad_query, a, place.group);
  const bool softmax = a.query_softmax();
  const float scale = query_scale(a, place.group);
  wide_query_softmax(a, tiles, queries, place.first, rows, scale);
  if (threadIdx.x < Wide::TOKENS) tiles.mean[threadIdx.x] = 0;
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < rows) {
    const std::int64_t at = place.group * a.arguments.queries + place.first + threadIdx.x;
    write(a.shift + at, tiles.shift[threadIdx.x]);
    write(a.factor + at, tiles.factor[threadIdx.x]);
  }
  auto weight = [&](int r, int d) { return wide_query_weight(a, tiles, queries, place.first, r, d, scale); };
  for (int walk = softmax ? 0 : 1; walk < 2; walk++)
    for (int feature = 0; feature < a.arguments.key_channels; feature += Wide::SIDE) {
      const int features = min(Wide::SIDE, a.arguments.key_channels - feature);
      typename Wide::OfTokens<E> grad;
      grad.clear();
      multiply_chunks<true>(
          grad, tiles, a.arguments.context + place.group * a.matrix(), a.arguments.value_channels, feature, features,
          a.arguments.value_channels, grad_outputs.along_tokens(),
          [&](int r, int c) { return r < rows ? to_float(read(grad_outputs.at(place.first + r, c))) : 0.0f; });
      if (walk == 0) {
        each_value(Wide::TOKENS, round_up(features, 16), queries.along_tokens(), Wide::WARPS, [&](int r, int d) {
          tiles.left[r * WIDE_STRIDE + d] = r < rows && d < features ? weight(r, feature + d) : 0.0f;
        });
        __syncthreads();
        dot_rows<Wide>(grad, tiles.left, WIDE_STRIDE, features, tiles.partial);
        __syncthreads();
        if (threadIdx.x < Wide::TOKENS)
          tiles.mean[threadIdx.x] +=
              sum_of_units(tiles.partial, ceil_div(features, 8 * Wide::NJ), Wide::TOKENS, threadIdx.x);
        continue;
      }
      grad.each([&](int r, int d, float& sum) {
        if (r >= rows || d >= features) return;
        const float x = softmax ? weight(r, feature + d) * (sum - tiles.mean[r]) : sum;
        write(grad_queries.at(place.first + r, feature + d), from_float<T>(x * (a.arguments.output_scale * scale)));
      });
    }
}

// The gradient of a tile of features of the keys, or of a tile of columns of the values.
template <class T, class E>
KERNEL(Wide::THREADS, Wide::BLOCKS)
attention_wide_key_kernel(const Attention a) {
  DYNAMIC_SHARED(memory);
  const WideTiles tiles(memory);
  bool* kept = reinterpret_cast<bool*>(tiles.mean);
  const int feature_tiles = ceil_div(a.arguments.key_channels, Wide::SIDE);
  const Share place =
      Share::of(a, a.arguments.tokens, feature_tiles + ceil_div(a.arguments.value_channels, Wide::SIDE));
  const int rows = static_cast<int>(place.last - place.first);
  const Rows<T> keys(a.arguments.key, a, place.group), values(a.arguments.value, a, place.group),
      grad_keys(a.arguments.grad_key, a, place.group), grad_values(a.arguments.grad_value, a, place.group);
  fetch_kept(kept, a, place.group, place.first, rows, Wide::TOKENS);
  __syncthreads();
  const float* grad_context = a.grad_context + place.group * a.matrix();
  auto softmax_of = [&](int d) { return KeySoftmax(a, place.group, d); };
  auto key = [&](int r, int d) { return to_float(read(keys.at(place.first + r, d))); };
  typename Wide::OfTokens<E> grad;
  grad.clear();
  if (place.tile < feature_tiles) {
    const int feature = place.tile * Wide::SIDE, features = min(Wide::SIDE, a.arguments.key_channels - feature);
    multiply_chunks<true>(grad, tiles, grad_context, a.arguments.value_channels, feature, features,
                          a.arguments.value_channels, values.along_tokens(),
                          [&](int r, int c) { return kept[r] ? to_float(read(values.at(place.first + r, c))) : 0.0f; });
    grad.each([&](int r, int d, float& sum) {
      if (r >= rows || d >= features) return;
      const KeySoftmax softmax = softmax_of(feature + d);
      const float x = kept[r] ? softmax.gradient(a, softmax.weight(a, key(r, feature + d)), sum) : 0.0f;
      write(grad_keys.at(place.first + r, feature + d), from_float<T>(x));
    });
  } else {
    const int column = (place.tile - feature_tiles) * Wide::SIDE;
    const int columns = min(Wide::SIDE, a.arguments.value_channels - column);
    multiply_chunks<false>(grad, tiles, grad_context, a.arguments.value_channels, column, columns,
                           a.arguments.key_channels, keys.along_tokens(),
                           [&](int r, int d) { return kept[r] ? softmax_of(d).weight(a, key(r, d)) : 0.0f; });
    grad.each([&](int r, int c, float& sum) {
      if (r < rows && c < columns)
        write(grad_values.at(place.first + r, column + c), from_float<T>(kept[r] ? sum : 0.0f));
    });
  }
}

// One tile of tokens a block.
inline Split split_wide(std::int64_t tokens) {
  return {ceil_div(tokens, static_cast<std::int64_t>(Wide::TOKENS)), Wide::TOKENS};
}

}  // namespace msformer::gpu
