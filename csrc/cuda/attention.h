// What the passes of efficient attention on query, key and value share.
//
//     context = rho_k(key)^T value,   output = output_scale rho_q(query) context
//
// rho_q is a softmax over the features of a query, rho_k one over the tokens of a key feature; or both divide by the
// square root of the number of tokens that are kept. An image and head is a group here. Queries, keys, values and their
// gradients are tokens of a group, context and its gradient [Dk, Dv] matrices of a group, always float32.
//
// A block walks over a part of the tokens of a group, a tile at a time. The tile after the one that is worked on is
// already on its way to the chip, as it is in memory (`fetch`); from there it goes as floats, weighted, into the tiles
// of the products, whose padding and missing tokens are zeros.
#pragma once

#include <cmath>
#include <type_traits>

#include "tiles.h"

namespace msformer::gpu {

// A pass in which a block has at most SIDE key features and SIDE value columns.
template <int SIDE_>
struct Shape {
  static constexpr int SIDE = SIDE_, TOKENS = SIDE == 64 ? 64 : 32, WARPS = SIDE == 64 ? 8 : 16, THREADS = 32 * WARPS;
  static constexpr int BLOCKS = SIDE == 64 ? 2 : 1;  // a multiprocessor
  static constexpr int NJ = SIDE == 64 ? 4 : 2, COLUMN_UNITS = SIDE / (8 * NJ);
  template <class E>
  using OfTokens = Product<E, TOKENS, SIDE, NJ, WARPS>;  // tokens x features or columns
  template <class E>
  using OverTokens = Product<E, SIDE, SIDE, 4, WARPS>;  // features x columns
};

// Strides of float tiles such that the parts of a fragment lie in different banks: of tiles whose rows an engine reads
// along the inner dimension, and of those whose columns it does.
template <class E>
BOTH constexpr int stride_of_rows(int columns) {
  return round_up(columns, 16) + (E::INNER == 16 ? 8 : 4);
}
template <class E>
BOTH constexpr int stride_of_columns(int columns) {
  return round_up(columns, 16) + (E::INNER == 16 ? 4 : 8);
}

struct Attention {               // what a pass gets
  AttentionArguments arguments;  // see api.h
  Split split;                   // of the tokens that it walks over
  float* partials;               // [groups, splits, Dk, Dv]: of the context or its gradient
  float *maxima, *sums;          // [groups, splits, Dk]: of the key softmax
  int* counts;                   // [groups, splits]: tokens that are kept
  float* grad_context;           // [groups, Dk, Dv]: all of it
  float* delta;                  // [groups, Dk]: <context, its gradient> of a feature
  float *shift, *factor;         // [groups, queries]: of the query softmax, where a pass needs them of an earlier one

  BOTH std::int64_t groups() const { return arguments.batch * arguments.heads; }
  BOTH std::int64_t matrix() const { return std::int64_t(arguments.key_channels) * arguments.value_channels; }
  BOTH bool query_softmax() const { return arguments.softmax && arguments.normalize_query; }
};

// Where a block works: tokens [first, last) of a group, and which of `tiles` things it makes of them.
struct Share {
  std::int64_t group, split, first, last;
  int tile;

  DEV static Share of(const Attention& a, std::int64_t tokens, int tiles) {
    const std::int64_t block = blockIdx.x, at = block / tiles, split = at % a.split.count;
    const std::int64_t first = split * a.split.size;
    return {at / a.split.count, split, first, first + a.split.size < tokens ? first + a.split.size : tokens,
            static_cast<int>(block % tiles)};
  }
};

inline dim3 grid_of(const Attention& a, int tiles = 1) {
  return dim3(static_cast<unsigned>(a.groups() * a.split.count * tiles));
}

// The tokens of a group.
template <class T>
struct Rows {
  T* data;
  std::int64_t token_stride, channel_stride;

  DEV Rows(const Heads& x, const Attention& a, std::int64_t group)
      : data(static_cast<T*>(x.data) + group / a.arguments.heads * x.batch_stride +
             group % a.arguments.heads * x.head_stride),
        token_stride(x.token_stride),
        channel_stride(x.channel_stride) {}
  DEV T* at(std::int64_t token, std::int64_t channel) const {
    return data + token * token_stride + channel * channel_stride;
  }
  DEV bool along_tokens() const { return token_stride == 1 && channel_stride != 1; }
};

// For every tile of a block's tokens: prepare(token, rows) works on what load(token, rows) fetched; work(token, rows)
// does while the tile after it is on its way. The block waits before both.
template <class S, class Load, class Prepare, class Work>
DEV void walk(const Share& place, Load load, Prepare prepare, Work work) {
  auto rows_of = [&](std::int64_t token) {
    return static_cast<int>(place.last - token < S::TOKENS ? place.last - token : S::TOKENS);
  };
  for (std::int64_t token = place.first - S::TOKENS; token < place.last; token += S::TOKENS) {
    const bool there = token >= place.first;
    if (there) {
      wait<0>();
      __syncthreads();
      prepare(token, rows_of(token));
      __syncthreads();
    }
    if (const std::int64_t next = token + S::TOKENS; next < place.last) {
      load(next, rows_of(next));
      commit();
    }
    if (there) work(token, rows_of(token));
  }
}

// f(row, column) of rows x columns; a warp goes along columns, or along rows (`down`).
template <class F>
DEV void each_value(int rows, int columns, bool down, int warps, F f) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (down)
    for (int c = warp; c < columns; c += warps)
#pragma unroll 2
      for (int r = lane; r < rows; r += 32) f(r, c);
  else
    for (int r = warp; r < rows; r += warps)
#pragma unroll 2
      for (int c = lane; c < columns; c += 32) f(r, c);
}

// Tokens as they are into a raw tile, of stride `tile_stride<T>`; to be waited for as `copy_matrix`.
template <class T>
DEV void fetch(T* raw, int stride, const Rows<T>& from, std::int64_t token, int channel, int rows, int columns,
               int warps) {
  if (from.channel_stride == 1)
    copy_matrix(raw, stride, from.at(token, channel), from.token_stride, rows, columns, 32 * warps);
  else
    each_value(rows, columns, from.along_tokens(), warps,
               [&](int r, int c) { raw[r * stride + c] = read(from.at(token + r, channel + c)); });
}

// Which of a tile's tokens are there and kept.
DEV void fetch_kept(bool* kept, const Attention& a, std::int64_t group, std::int64_t token, int rows, int tile) {
  const int r = threadIdx.x;
  if (r >= tile) return;
  const Mask& mask = a.arguments.mask;
  const std::int64_t row = group / a.arguments.heads * mask.batch_stride + (token + r) * mask.token_stride;
  kept[r] = r < rows && (!mask.data || read(mask.data + row) != 0);
}

// A raw tile as floats; zeros in the padding and for tokens that do not count.
template <class T, class Counts>
DEV void widen(float* tile, int stride, const T* raw, int raw_stride, int rows, int columns, int warps, Counts counts) {
  each_value(rows, round_up(columns, 16), false, warps, [&](int r, int c) {
    tile[r * stride + c] = c < columns && counts(r) ? to_float(raw[r * raw_stride + c]) : 0.0f;
  });
}

// A tile of floats as tokens, a warp along a row.
template <class T>
DEV void write_rows(const Rows<T>& to, std::int64_t token, int channel, const float* tile, int stride, int rows,
                    int columns, int warps) {
  each_value(rows, columns, to.along_tokens(), warps,
             [&](int r, int c) { write(to.at(token + r, channel + c), from_float<T>(tile[r * stride + c])); });
}

// What multiplies a query before its softmax, or instead of one.
DEV float query_scale(const Attention& a, std::int64_t group) {
  const float scale = a.arguments.query_scale;
  if (a.arguments.softmax || !a.arguments.normalize_query) return scale;
  const float length = read(a.arguments.key_sum + group * a.arguments.key_channels);
  return scale / (length > 1 ? length : 1.0f);
}

// Weights of a query are exp(scale query - shift) factor.
struct QuerySoftmax {
  float shift, factor;
};

// By value(feature), for a whole warp; put(feature, exp(scale query - shift)).
template <class Value, class Put>
DEV QuerySoftmax query_softmax(int features, float scale, Value value, Put put) {
  const int lane = threadIdx.x % 32;
  float largest = -INFINITY, sum = 0;
  for (int d = lane; d < features; d += 32) largest = max(largest, multiply(value(d), scale));
  largest = warp_max(largest);
  const float shift = largest == -INFINITY ? 0.0f : largest;
  for (int d = lane; d < features; d += 32) {
    const float x = expf(multiply(value(d), scale) - shift);
    put(d, x);
    sum += x;
  }
  return {shift, 1 / warp_sum(sum)};
}

// The weights of a tile of queries, of which `raw` holds all features.
template <class T>
DEV void weigh_queries(float* tile, int stride, const T* raw, int raw_stride, int tokens, int rows, int features,
                       float scale, bool softmax, int warps) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int r = warp; r < tokens; r += warps) {
    float* to = tile + r * stride;
    auto value = [&](int d) { return to_float(raw[r * raw_stride + d]); };
    const int there = r < rows ? features : 0;
    if (softmax && there) {
      const float factor = query_softmax(features, scale, value, [&](int d, float x) { to[d] = x; }).factor;
      for (int d = lane; d < features; d += 32) to[d] *= factor;
    } else {
      for (int d = lane; d < there; d += 32) to[d] = value(d) * scale;
    }
    for (int d = there + lane; d < round_up(features, 16); d += 32) to[d] = 0;
  }
}

// Row sums of weights times a product of tokens, in parts: of every unit of columns, [COLUMN_UNITS, TOKENS].
template <class S, class P>
DEV void dot_rows(const P& product, const float* weights, int stride, int columns, float* partial) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, wide = round_up(columns, 16);
#pragma unroll
  for (int u = 0; u < P::UNITS; u++) {
    const int unit = warp + u * S::WARPS, row = unit % P::ROW_UNITS * 16, column = unit / P::ROW_UNITS * (8 * S::NJ);
    if (unit >= P::ALL || column >= columns) continue;
    float sum[2] = {};
#pragma unroll
    for (int j = 0; j < S::NJ; j++)
#pragma unroll
      for (int q = 0; q < 4; q++) {
        const int r = row + lane / 4 + q / 2 * 8, c = column + 8 * j + lane % 4 * 2 + q % 2;
        if (c < wide) sum[q / 2] += product.sum[u][j][q] * weights[r * stride + c];
      }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      sum[h] += __shfl_xor_sync(ALL_LANES, sum[h], 1);
      sum[h] += __shfl_xor_sync(ALL_LANES, sum[h], 2);
      if (lane % 4 == 0) partial[unit / P::ROW_UNITS * S::TOKENS + row + lane / 4 + h * 8] = sum[h];
    }
  }
}
// Column sums of the same, in parts: of every 16 tokens, [TOKENS / 16, SIDE].
template <class S, class P>
DEV void dot_columns(const P& product, const float* weights, int stride, int columns, float* partial) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, wide = round_up(columns, 16);
#pragma unroll
  for (int u = 0; u < P::UNITS; u++) {
    const int unit = warp + u * S::WARPS, row = unit % P::ROW_UNITS * 16, column = unit / P::ROW_UNITS * (8 * S::NJ);
    if (unit >= P::ALL || column >= columns) continue;
#pragma unroll
    for (int j = 0; j < S::NJ; j++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int r = row + lane / 4, c = column + 8 * j + lane % 4 * 2 + h;
        float sum = 0;
        if (c < wide)
          sum =
              product.sum[u][j][h] * weights[r * stride + c] + product.sum[u][j][h + 2] * weights[(r + 8) * stride + c];
        for (int bits = 4; bits < 32; bits *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, bits);
        if (lane < 4) partial[row / 16 * S::SIDE + c] = sum;
      }
  }
}

// One of the sums whose parts those are, `stride` apart.
DEV float sum_of_units(const float* partial, int units, int stride, int at) {
  float sum = 0;
  for (int u = 0; u < units; u++) sum += partial[u * stride + at];
  return sum;
}

// The weights of one key feature, and the gradient of the keys.
struct KeySoftmax {
  float shift, inverse, delta;

  DEV KeySoftmax(const Attention& a, std::int64_t group, int feature) {
    const std::int64_t at = group * a.arguments.key_channels + feature;
    const float largest = a.arguments.softmax ? read(a.arguments.key_max + at) : 0.0f;
    const float sum = read(a.arguments.key_sum + at);
    shift = largest == -INFINITY ? 0.0f : largest;
    inverse = 1 / (sum == 0 ? 1.0f : sum);
    delta = a.arguments.softmax ? read(a.delta + at) : 0.0f;
  }

  DEV float weight(const Attention& a, float key) const {
    const float logit = multiply(key, a.arguments.key_scale);
    return (a.arguments.softmax ? expf(logit - shift) : logit) * inverse;
  }

  // From that of the weight. One token with all the weight gets exactly none, whatever the rounding of delta is.
  DEV float gradient(const Attention& a, float weight, float grad) const {
    if (!a.arguments.softmax) return grad * inverse * a.arguments.key_scale;
    return weight * (grad - (weight == 1 ? grad : delta)) * a.arguments.key_scale;
  }
};

// f(activations, engine) for the products of an engine. tf32 is finer than bf16, and bf16 exact in it; float16, as fine
// as tf32, needs more. EXACT: results stay float32 whatever the activations are; those are the right operands.
template <bool EXACT, class F>
int with_products(Engine engine, F f) {
  switch (engine) {
    case Engine::bf16:
      return f(bf16{}, std::conditional_t<EXACT, Bf16Parts<3, 1>, Tf32>{});
    case Engine::f16:
      return f(f16{}, std::conditional_t<EXACT, Bf16Parts<3, 2>, Bf16Parts<2, 2>>{});
    case Engine::tf32:
      return f(float{}, Tf32{});
    default:
      return f(float{}, Fp32{});
  }
}

// f(shape) of the smaller shape that holds key features and value columns, or of the larger one.
template <class F>
auto with_shape(const AttentionArguments& a, F f) {
  return a.key_channels <= 64 && a.value_channels <= 64 ? f(Shape<64>{}) : f(Shape<128>{});
}

}  // namespace msformer::gpu
