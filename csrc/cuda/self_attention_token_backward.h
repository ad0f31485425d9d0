// The token pass of the backward of folded self-attention. With the weights e = exp(K - max) of the key softmax made
// again, and dA and delta divided by its sum already,
//
//     dK = e (X dA^T - delta)      dX = dQ W_q + e dA + dK W_k      dW_q = dQ^T X      dW_k = dK^T X
//
// and through LayerNorm and residual the gradient of x. A block walks over tiles of tokens, of one image after the
// other, and within a tile over chunks of key features; dW_q and dW_k stay in the registers of its warps.
#pragma once

#include "self_attention.h"

namespace msformer::gpu {

constexpr int CHUNK = 32, CHUNKS = MOST_FEATURES / CHUNK, MOST_ROWS = 64;

struct TokenPass {
  SelfAttentionArguments arguments;
  int rows;     // of a tile: MOST_ROWS or half as many
  int at_once;  // rows of W_q, W_k and dA that are on the chip at a time: all, or CHUNK
  const void *grad_query, *query_weight, *key_weight, *grad_key_tokens;  // see QueryPass, Fold, FoldBackward
  const float* delta;
  float* partials;  // [blocks, size]: dW_q and dW_k [keys, channels], of the query bias, of weight and bias of the norm
  std::int64_t size;  // of a block's

  BOTH std::int64_t tiles_of_image() const { return ceil_div(arguments.tokens, rows); }
};

template <class E>
struct TokenMemory {
  using T = typename E::Store;
  using Sum = typename SumEngine<E>::Store;
  int stride, sum_stride, chunk_stride, grad_stride;
  int maxima, delta, kept, softmax_sums, query_bias, norm_weight, norm_bias, query_weight, key_weight, grad_key_tokens;
  int tokens, grad_query, weights, grad_key, grad_x, all;

  BOTH explicit TokenMemory(const TokenPass& p) {
    const int channels = p.arguments.channels, size = sizeof(T);
    Carver m;
    stride = tile_stride<T>(channels);
    sum_stride = tile_stride<Sum>(channels);
    chunk_stride = tile_stride<T>(CHUNK);
    grad_stride = tile_stride<float>(channels);
    maxima = m.take(MOST_FEATURES * 4);
    delta = m.take(MOST_FEATURES * 4);
    kept = m.take(MOST_ROWS * 4);
    softmax_sums = m.take(MOST_ROWS / 16 * CHUNK * 2 * 4);
    query_bias = m.take(ColumnSums::BYTES);
    norm_weight = m.take(ColumnSums::BYTES);
    norm_bias = m.take(ColumnSums::BYTES);
    query_weight = m.take(p.at_once * stride * size);
    key_weight = m.take(p.at_once * stride * size);
    grad_key_tokens = m.take(p.at_once * sum_stride * static_cast<int>(sizeof(Sum)));
    tokens = grad_x = m.used;  // the gradient of x takes the place of the tiles that it is made from
    m.take(p.rows * stride * size);
    grad_query = m.take(p.rows * chunk_stride * size);
    weights = m.take(p.rows * chunk_stride * size);
    grad_key = m.take(p.rows * chunk_stride * size);
    all = max(m.used, grad_x + p.rows * grad_stride * 4);
  }
};

template <class E>
struct TokenBlock {
  using T = typename E::Store;
  using Sum = SumEngine<E>;
  using SumStore = typename Sum::Store;
  const TokenPass& pass;
  const SelfAttentionArguments& a;
  const TokenMemory<E> m;
  T *tokens, *grad_query, *weights, *grad_key;
  float *maxima, *delta, *kept, *softmax_sums, *grad_x;
  ColumnSums query_bias, norm_weight, norm_bias;
  StagedRows<T> query_weight, key_weight;
  StagedRows<SumStore> grad_key_tokens;
  int warp, channels, keys;  // these in multiples of 16
  int row, unit;             // of the tile: rows of this warp, and its number among the warps with the same rows

  int image = -1;
  int first = 0;  // token of the tile

  DEV TokenBlock(const TokenPass& p, unsigned char* memory)
      : pass(p),
        a(p.arguments),
        m(p),
        query_bias(memory + m.query_bias),
        norm_weight(memory + m.norm_weight),
        norm_bias(memory + m.norm_bias) {
    auto tile = [&](int at) { return reinterpret_cast<T*>(memory + at); };
    auto floats = [&](int at) { return reinterpret_cast<float*>(memory + at); };
    tokens = tile(m.tokens);
    grad_query = tile(m.grad_query);
    weights = tile(m.weights);
    grad_key = tile(m.grad_key);
    maxima = floats(m.maxima);
    delta = floats(m.delta);
    kept = floats(m.kept);
    softmax_sums = floats(m.softmax_sums);
    grad_x = floats(m.grad_x);
    warp = threadIdx.x / 32;
    channels = round_up(a.channels, 16);
    keys = round_up(a.keys, 16);
    query_weight = {tile(m.query_weight), m.stride, p.at_once, static_cast<const T*>(p.query_weight), a.keys, channels};
    key_weight = {tile(m.key_weight), m.stride, p.at_once, static_cast<const T*>(p.key_weight), a.keys, channels};
    grad_key_tokens = {reinterpret_cast<SumStore*>(memory + m.grad_key_tokens), m.sum_stride, p.at_once,
                       static_cast<const SumStore*>(p.grad_key_tokens),         a.keys,       channels};
    row = warp % (p.rows / 16) * 16;
    unit = warp / (p.rows / 16);

    if (query_weight.resident()) {
      query_weight.stage_from(0);
      key_weight.stage_from(0);
    }
  }

  DEV LaneNorm<T> norm() const { return {a.parameters.norm.weight, a.parameters.norm.bias, a.channels, a.eps}; }

  DEV void stage_grad_key_tokens(int feature) {
    StagedRows<SumStore> rows = grad_key_tokens;
    rows.matrix += static_cast<std::int64_t>(image) * a.keys * channels;
    rows.stage_from(feature);
  }

  DEV void take_image(int now) {
    if (image == now) return;
    image = now;
    if (query_weight.resident()) stage_grad_key_tokens(0);
    for (int j = threadIdx.x; j < a.keys; j += THREADS) {
      const std::int64_t at = static_cast<std::int64_t>(image) * a.keys + j;
      const float largest = read(a.state.key_max + at);
      maxima[j] = largest == -INFINITY ? 0.0f : largest;
      delta[j] = read(pass.delta + at);
    }
  }

  DEV void load_tokens() {
    const ImageTokens<T> x(a.x, image, a.channels);
    const LaneNorm<T> lane_norm = norm();
    constexpr int ROWS = 8 / sizeof(T);  // at a time
    for (int r = warp; r < pass.rows; r += ROWS * WARPS) {
      TokenRows<T, ROWS> rows;
      rows.fetch(x, first + r, WARPS, a.tokens);
      rows.put(
          lane_norm, tokens + r * m.stride, m.stride, WARPS, [&](int i) { return first + r + i * WARPS < a.tokens; },
          [](int, const float (&)[4]) {});
    }
    for (int r = threadIdx.x; r < pass.rows; r += THREADS)
      kept[r] = first + r < a.tokens && is_kept(a.mask, image, first + r) ? 1.0f : 0.0f;
  }

  // dQ of the chunk from `feature` on, and the rows of matrices that are not there yet. All threads wait here.
  DEV void load_chunk(int feature, int features) {
    const int count = a.tokens - first < pass.rows ? static_cast<int>(a.tokens - first) : pass.rows;
    copy_aligned_rows<CHUNK>(grad_query, m.chunk_stride,
                             static_cast<const T*>(pass.grad_query) + (image * a.tokens + first) * keys + feature, keys,
                             count, features);
    clear_rows(grad_query + count * m.chunk_stride, m.chunk_stride, pass.rows - count, features);
    if (!query_weight.resident()) {
      query_weight.stage_from(feature);
      key_weight.stage_from(feature);
      stage_grad_key_tokens(feature);
    }
    commit();
    wait<0>();
    __syncthreads();
  }

  // Tiles of e and dK. `start` is where the chunk's rows begin in the tiles of matrices.
  DEV void make_weights(int feature, int features, int start) {
    const int own = 16 * unit;  // 16 rows and features each warp
    const bool works = own < features;
    WarpProduct<2> p;  // logits; then the gradient of the weights
    auto at = [&](int j, int q) { return (row + p.row(q)) * m.chunk_stride + own + p.column(j, q); };
    auto counts = [&](int j, int q) { return kept[row + p.row(q)] != 0 && feature + own + p.column(j, q) < a.keys; };
    auto weight = [&](int j, int q) { return to_float(weights[at(j, q)]); };
    if (works) {
      p.clear();
      p.template add<E, false, true>(tokens, m.stride, row, key_weight.tile + start * m.stride, m.stride, own, channels,
                                     0, 16);
      p.each(0, 16, [&](int j, int q, float x) {
        const float e = counts(j, q) ? as_operand<E>(expf(x - maxima[feature + own + p.column(j, q)])) : 0.0f;
        weights[at(j, q)] = from_float<T>(e);
      });
      p.clear();
      p.template add<Sum, false, true>(tokens, m.stride, row, grad_key_tokens.tile + start * m.sum_stride, m.sum_stride,
                                       own, channels, 0, 16);
    }
    // With all tokens in one tile the sums are those of the tile itself: errors cancel, and a single token has all the
    // weight exactly.
    if (a.tokens <= pass.rows) {
      if (works)
#pragma unroll
        for (int j = 0; j < 2; j++)
          for (int q = 0; q < 2; q++) {
            float total = weight(j, q) + weight(j, q + 2);
            float grads = (counts(j, q) ? weight(j, q) * p.sum[j][q] : 0.0f) +
                          (counts(j, q + 2) ? weight(j, q + 2) * p.sum[j][q + 2] : 0.0f);
            for (int bits = 4; bits < 32; bits *= 2) {
              total += __shfl_xor_sync(ALL_LANES, total, bits);
              grads += __shfl_xor_sync(ALL_LANES, grads, bits);
            }
            if (threadIdx.x % 32 >= 4) continue;
            float* sums = softmax_sums + (row / 16 * CHUNK + own + p.column(j, q)) * 2;
            sums[0] = total;
            sums[1] = grads;
          }
      __syncthreads();
      for (int j = threadIdx.x; j < features; j += THREADS) {
        float total = 0, grads = 0;
        for (int u = 0; u < pass.rows / 16; u++) {
          total += softmax_sums[(u * CHUNK + j) * 2];
          grads += softmax_sums[(u * CHUNK + j) * 2 + 1];
        }
        delta[feature + j] = total == 0 ? 0.0f : grads / total;
      }
      __syncthreads();
    }
    if (!works) return;
    p.each(0, 16, [&](int j, int q, float grad) {
      grad = counts(j, q) ? weight(j, q) * (grad - delta[feature + own + p.column(j, q)]) : 0.0f;
      grad_key[at(j, q)] = from_float<T>(grad);
    });
  }

  DEV void sum_query_bias(int feature, int features) {
    const int lane = threadIdx.x % 32;
    if (lane >= features) return;
    float sum = 0;
#pragma unroll 1
    for (int r = warp; r < pass.rows; r += WARPS) sum += to_float(grad_query[r * m.chunk_stride + lane]);
    query_bias.part(feature + lane) = sum;
  }

  // The gradient of x from that of the normalised tokens, `grad_x`.
  DEV void write_grad_x() {
    const ImageTokens<T> x(a.x, image, a.channels), grad_output(a.grad_output, image, a.channels),
        output(a.grad_x, image, a.channels);
    const LaneNorm<T> lane_norm = norm();
    float weight_sums[4] = {}, bias_sums[4] = {};
    for (int r = warp; r < pass.rows && first + r < a.tokens; r += WARPS) {
      float g[4];
      for (int i = 0; i < 4; i++)
        g[i] = lane_channel() + i < a.channels ? grad_x[r * m.grad_stride + lane_channel() + i] : 0.0f;
      if (lane_norm.on) {
        float normalized[4];
        widen(normalized, x.load(first + r, lane_channel()));
        const float rstd = lane_norm.normalize(normalized);
        float mean = 0, slope = 0;
        for (int i = 0; i < 4; i++) {
          weight_sums[i] += g[i] * normalized[i];
          bias_sums[i] += g[i];
          g[i] *= lane_norm.weight[i];
          mean += g[i];
          slope += g[i] * normalized[i];
        }
        mean = warp_sum(mean) / static_cast<float>(a.channels);
        slope = warp_sum(slope) / static_cast<float>(a.channels);
        for (int i = 0; i < 4; i++) g[i] = rstd * (g[i] - mean - normalized[i] * slope);
      }
      if (a.residual) {
        float added[4];
        widen(added, grad_output.load(first + r, lane_channel()));
        for (int i = 0; i < 4; i++) g[i] += added[i];
      }
      output.store(first + r, lane_channel(), g);
    }
    for (int i = 0; i < 4; i++) {
      norm_weight.part(lane_channel() + i) = weight_sums[i];
      norm_bias.part(lane_channel() + i) = bias_sums[i];
    }
  }
};

template <class E>
KERNEL(THREADS, 1)
self_attention_token_backward_kernel(const TokenPass pass) {
  using Sum = SumEngine<E>;
  const SelfAttentionArguments& a = pass.arguments;
  DYNAMIC_SHARED(memory);
  TokenBlock<E> b(pass, memory);
  const auto& m = b.m;

  WarpProduct<4> grad_query_weight[CHUNKS], grad_key_weight[CHUNKS];  // 16 features x 32 channels of each chunk
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    grad_query_weight[c].clear();
    grad_key_weight[c].clear();
  }
  const int feature_row = b.warp % 2 * 16, feature_column = b.warp / 2 * 32;
  const int feature_columns = min(32, b.channels - feature_column);
  const int column = b.unit * pass.rows;  // of dX: `row` and 15 more rows, `rows` columns from here on
  const int columns = min(pass.rows, b.channels - column);

  const std::int64_t tiles = a.batch * pass.tiles_of_image();
  const int tiles_of_image = static_cast<int>(pass.tiles_of_image());
  const int end = static_cast<int>(tiles * (blockIdx.x + 1) / gridDim.x);
  for (int t = static_cast<int>(tiles * blockIdx.x / gridDim.x); t < end; t++) {
    b.take_image(t / tiles_of_image);
    b.first = t % tiles_of_image * pass.rows;
    b.load_tokens();
    WarpProduct<8> grad;
    grad.clear();
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      const int feature = chunk * CHUNK, features = min(CHUNK, b.keys - feature),
                start = b.query_weight.resident() ? feature : 0;
      if (features <= 0) break;
      b.load_chunk(feature, features);
      b.make_weights(feature, features, start);
      b.sum_query_bias(feature, features);
      __syncthreads();
      if (feature_row < features && feature_columns > 0)
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)  // registers have no index
          if (c == chunk)
            add_both<E>(grad_query_weight[c], grad_key_weight[c], b.grad_query, b.grad_key, m.chunk_stride, feature_row,
                        b.tokens, m.stride, feature_column, pass.rows, feature_columns);
      if (columns > 0) {
        grad.template add<E, false, false>(b.grad_query, m.chunk_stride, b.row, b.query_weight.tile + start * m.stride,
                                           m.stride, column, features, 0, columns);
        grad.template add<Sum, false, false>(b.weights, m.chunk_stride, b.row,
                                             b.grad_key_tokens.tile + start * m.sum_stride, m.sum_stride, column,
                                             features, 0, columns);
        grad.template add<E, false, false>(b.grad_key, m.chunk_stride, b.row, b.key_weight.tile + start * m.stride,
                                           m.stride, column, features, 0, columns);
      }
      __syncthreads();
    }
    grad.each(0, columns, [&](int j, int q, float sum) {
      b.grad_x[(b.row + grad.row(q)) * m.grad_stride + column + grad.column(j, q)] = sum;
    });
    __syncthreads();
    b.write_grad_x();
    __syncthreads();
    b.query_bias.add_parts(a.keys);
    b.norm_weight.add_parts(a.channels);
    b.norm_bias.add_parts(a.channels);
  }

  float* sums = pass.partials + blockIdx.x * pass.size;
  const std::int64_t matrix = static_cast<std::int64_t>(a.keys) * a.channels;
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++) {
    grad_query_weight[chunk].each(0, 32, [&](int j, int q, float sum) {
      const int feature = chunk * CHUNK + feature_row + grad_query_weight[chunk].row(q);
      const int channel = feature_column + grad_query_weight[chunk].column(j, q);
      if (feature >= a.keys || channel >= a.channels) return;
      write(sums + feature * a.channels + channel, sum);
      write(sums + matrix + feature * a.channels + channel, grad_key_weight[chunk].sum[j][q]);
    });
  }
  sums += 2 * matrix;
  b.query_bias.write_to(sums, a.keys);
  b.norm_weight.write_to(sums + a.keys, a.channels);
  b.norm_bias.write_to(sums + a.keys + a.channels, a.channels);
}

}  // namespace msformer::gpu
