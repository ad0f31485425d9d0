// Sums over the tokens of efficient attention: weights^T of the left tokens times the right ones, [Dk, Dv], in partial
// sums of every split, and their sum. The context is that of keys and values, its gradient that of queries and
// gradients of the output.
#pragma once

#include "attention.h"

namespace msformer::gpu {

template <class T, class E, class S>
struct ReductionMemory {
  static constexpr int PARTS = S::THREADS / S::SIDE;  // threads that share a feature
  int left, right, raw_left, raw_right, kept, part, rescale, all, stride, raw_stride;

  BOTH explicit ReductionMemory(const AttentionArguments& a) {
    const int widest = min(S::SIDE, max(a.key_channels, a.value_channels));
    Carver m;
    stride = stride_of_columns<E>(widest);
    raw_stride = tile_stride<T>(widest);
    left = m.take(S::TOKENS * stride * 4);
    right = m.take(S::TOKENS * stride * 4);
    raw_left = m.take(S::TOKENS * raw_stride * static_cast<int>(sizeof(T)));
    raw_right = m.take(S::TOKENS * raw_stride * static_cast<int>(sizeof(T)));
    kept = m.take(S::TOKENS);
    part = m.take(PARTS * S::SIDE * 4);
    rescale = m.take(S::SIDE * 4);
    all = m.used;
  }
};

// Of keys: online softmax, a few threads a feature; every one of them keeps the maximum, and the sum of its own tokens.
template <class S>
struct RunningSoftmax {
  float largest, sum = 0;
  int feature = threadIdx.x % S::SIDE, part = threadIdx.x / S::SIDE;

  DEV explicit RunningSoftmax(bool softmax) : largest(softmax ? -INFINITY : 0.0f) {}

  // Weights of a raw tile; and for a softmax by how much what was summed before shrinks, where all threads of the block
  // wait.
  template <class T>
  DEV void weigh(float* tile, int stride, const T* raw, int raw_stride, const bool* kept, int features, float scale,
                 bool softmax, float* parts, float* rescale) {
    constexpr int PARTS = S::THREADS / S::SIDE;
    const bool there = feature < features;
    auto logit = [&](int r) { return multiply(to_float(raw[r * raw_stride + feature]), scale); };
    if (!softmax) {
      for (int r = part; there && r < S::TOKENS; r += PARTS) tile[r * stride + feature] = kept[r] ? logit(r) : 0.0f;
      return;
    }
    const float before = largest;
    for (int r = part; there && r < S::TOKENS; r += PARTS)
      if (kept[r]) largest = max(largest, logit(r));
    parts[part * S::SIDE + feature] = largest;
    __syncthreads();
    for (int p = 0; p < PARTS; p++) largest = max(largest, parts[p * S::SIDE + feature]);
    const float shift = largest == -INFINITY ? 0.0f : largest, shrink = expf(before - shift);
    sum *= shrink;
    if (part == 0) rescale[feature] = shrink;
    for (int r = part; there && r < S::TOKENS; r += PARTS) {
      const float x = kept[r] ? expf(logit(r) - shift) : 0.0f;
      sum += x;
      tile[r * stride + feature] = x;
    }
  }

  // The sum of all tokens, for the threads of part 0. All threads of the block wait here.
  DEV float total(float* parts) const {
    parts[part * S::SIDE + feature] = sum;
    __syncthreads();
    float found = 0;
    for (int p = 0; p < S::THREADS / S::SIDE; p++) found += parts[p * S::SIDE + feature];
    return found;
  }
};

// KEYS: the context of keys and values, with the statistics of its softmax. Else its gradient, of queries, whose
// softmax is known, and gradients of the output.
template <class T, class E, class S, bool KEYS>
KERNEL(S::THREADS, S::BLOCKS)
attention_reduction_kernel(const Attention a) {
  DYNAMIC_SHARED(memory);
  const ReductionMemory<T, E, S> m(a.arguments);
  auto floats = [&](int at) { return reinterpret_cast<float*>(memory + at); };
  auto raw = [&](int at) { return reinterpret_cast<T*>(memory + at); };
  float *left = floats(m.left), *right = floats(m.right), *rescale = floats(m.rescale);
  bool* kept = reinterpret_cast<bool*>(memory + m.kept);

  const int column_tiles = ceil_div(a.arguments.value_channels, S::SIDE);
  const int tiles = column_tiles * ceil_div(a.arguments.key_channels, S::SIDE);
  const Share place = Share::of(a, KEYS ? a.arguments.tokens : a.arguments.queries, tiles);
  const int feature = place.tile / column_tiles * S::SIDE, column = place.tile % column_tiles * S::SIDE;
  const int features = min(S::SIDE, a.arguments.key_channels - feature);
  const int columns = min(S::SIDE, a.arguments.value_channels - column);
  const Rows<T> lefts(KEYS ? a.arguments.key : a.arguments.query, a, place.group);
  const Rows<T> rights(KEYS ? a.arguments.value : a.arguments.grad_output, a, place.group);
  const bool softmax = KEYS ? a.arguments.softmax : a.query_softmax();
  const float scale = KEYS ? a.arguments.key_scale : query_scale(a, place.group);

  int count = 0;  // of one token of the tile, for each of the first threads
  RunningSoftmax<S> running(softmax);
  typename S::template OverTokens<E> sums;
  sums.clear();
  auto load = [&](std::int64_t token, int rows) {
    fetch(raw(m.raw_left), m.raw_stride, lefts, token, feature, rows, features, S::WARPS);
    fetch(raw(m.raw_right), m.raw_stride, rights, token, column, rows, columns, S::WARPS);
    if constexpr (KEYS) {
      fetch_kept(kept, a, place.group, token, rows, S::TOKENS);
      if (threadIdx.x < S::TOKENS) count += kept[threadIdx.x];
    }
  };
  auto prepare = [&](std::int64_t token, int rows) {
    if constexpr (KEYS) {
      running.weigh(left, m.stride, raw(m.raw_left), m.raw_stride, kept, features, scale, softmax, floats(m.part),
                    rescale);
    } else {
      const std::int64_t query = place.group * a.arguments.queries + token;
      each_value(S::TOKENS, round_up(features, 16), false, S::WARPS, [&](int r, int d) {
        float x = 0;
        if (r < rows && d < features) {
          x = multiply(to_float(raw(m.raw_left)[r * m.raw_stride + d]), scale);
          if (softmax) x = expf(x - read(a.shift + query + r)) * read(a.factor + query + r);
        }
        left[r * m.stride + d] = x;
      });
    }
    widen(right, m.stride, raw(m.raw_right), m.raw_stride, S::TOKENS, columns, S::WARPS,
          [&](int r) { return KEYS ? kept[r] : r < rows; });
  };
  auto work = [&](std::int64_t, int) {
    if (KEYS && softmax) sums.each([&](int d, int, float& sum) { sum *= rescale[d]; });
    sums.template add<true, false>(left, m.stride, right, m.stride, S::TOKENS, features, columns);
  };
  walk<S>(place, load, prepare, work);

  const std::int64_t row = place.group * a.split.count + place.split;
  if constexpr (KEYS) {
    __syncthreads();
    const float total = running.total(floats(m.part));
    if (column == 0 && running.part == 0 && running.feature < features) {
      const std::int64_t at = row * a.arguments.key_channels + feature + running.feature;
      write(a.maxima + at, running.largest);
      write(a.sums + at, total);
    }
    if (place.tile == 0) {
      int* counts = reinterpret_cast<int*>(memory + m.rescale);
      __syncthreads();
      if (threadIdx.x < S::TOKENS) counts[threadIdx.x] = count;
      __syncthreads();
      if (threadIdx.x < 32) {
        int all = 0;
        for (int r = threadIdx.x; r < S::TOKENS; r += 32) all += counts[r];
        all = warp_sum(all);
        if (threadIdx.x == 0) write(a.counts + row, all);
      }
    }
  }
  const float factor = KEYS ? 1.0f : a.arguments.output_scale;
  float* to = a.partials + row * a.matrix() + static_cast<std::int64_t>(feature) * a.arguments.value_channels + column;
  sums.each([&](int d, int c, float& sum) {
    if (d < features && c < columns)
      write(to + static_cast<std::int64_t>(d) * a.arguments.value_channels + c, sum * factor);
  });
}

template <class S>
Split split_reduction(const AttentionArguments& a, std::int64_t tokens) {
  const std::int64_t tiles = ceil_div(a.key_channels, S::SIDE) * ceil_div(a.value_channels, S::SIDE);
  return split_tokens(tokens, S::TOKENS, a.batch * a.heads * tiles, S::BLOCKS * processors());
}

template <class T, class E, class S, bool KEYS>
int reduce(const Attention& a, void* stream) {
  const int tiles = ceil_div(a.arguments.key_channels, S::SIDE) * ceil_div(a.arguments.value_channels, S::SIDE);
  return launch<attention_reduction_kernel<T, E, S, KEYS>>(grid_of(a, tiles), S::THREADS,
                                                           ReductionMemory<T, E, S>(a.arguments).all, stream, a);
}

// Kernels that add the splits: a block a feature, its warps share the splits and its lanes the columns.
constexpr int COMBINE_WARPS = 8, COMBINE_THREADS = 32 * COMBINE_WARPS, COMBINE_COLUMNS = 128;
constexpr int COMBINE_MEMORY = COMBINE_WARPS * COMBINE_COLUMNS * 4;

// The sum over splits of weight(split) times the partial sum, of column `first` + threadIdx.x, for the first threads,
// in fixed order. All threads of the block wait here.
template <class Weight>
DEV float sum_of_splits(float* shared, const Attention& a, std::int64_t group, int feature, int first, Weight weight) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, width = a.arguments.value_channels;
  float sum[COMBINE_COLUMNS / 32] = {};
  for (std::int64_t k = warp; k < a.split.count; k += COMBINE_WARPS) {
    const float* from = a.partials + ((group * a.split.count + k) * a.arguments.key_channels + feature) * width;
    const float factor = weight(k);
#pragma unroll
    for (int j = 0; j < COMBINE_COLUMNS / 32; j++) {
      const int c = first + 32 * j + lane;
      if (c < width) sum[j] += read(from + c) * factor;
    }
  }
  __syncthreads();  // until the sums before have been read
#pragma unroll
  for (int j = 0; j < COMBINE_COLUMNS / 32; j++) shared[warp * COMBINE_COLUMNS + 32 * j + lane] = sum[j];
  __syncthreads();
  float total = 0;
  for (int w = 0; w < COMBINE_WARPS && threadIdx.x < COMBINE_COLUMNS; w++)
    total += shared[w * COMBINE_COLUMNS + threadIdx.x];
  return total;
}

}  // namespace msformer::gpu
