// Folded efficient self-attention, backward, in two passes over the tokens that recompute both softmaxes.
//
// The query pass makes P = rho_q again, writes the gradient of the queries and sums dM = P^T dY over a split. Small
// kernels (self_attention_fold.cu) turn dM into dA and delta. The token pass makes the weights e = exp(K - max) of the
// key softmax again; with dA and delta divided by the sum of the softmax already,
//
//     dK = e (X dA^T - delta)      dX = dQ W_q + e dA + dK W_k      dW_q = dQ^T X      dW_k = dK^T X
//
// and through LayerNorm and residual writes the gradient of x. Sums over tokens go to partial sums, one for each split
// or block, which `sum_partials` adds.
#include "self_attention.h"

namespace msformer::gpu {
namespace {

constexpr int CHUNK = 32, CHUNKS = MOST_FEATURES / CHUNK;  // key features at a time, in the token pass

// A lane's sums of four channels over the rows of its warp -> sums of the block, written; `parts` has room for
// WARPS x MOST_CHANNELS values.
DEV void write_column_sums(float* to, const float (&sums)[4], float* parts, int channels) {
  __syncthreads();
  for (int i = 0; i < 4; i++) parts[threadIdx.x / 32 * MOST_CHANNELS + lane_channel() + i] = sums[i];
  __syncthreads();
  for (int c = threadIdx.x; c < channels; c += THREADS) {
    float sum = 0;
    for (int w = 0; w < WARPS; w++) sum += parts[w * MOST_CHANNELS + c];
    write(to + c, sum);
  }
}

// grad -> weights (grad - sum(weights grad)), the sum over a head.
DEV void softmax_heads_backward(WideProduct& weights, WideProduct& grad, int heads, int head_keys) {
  for (int head = 0; head < heads; head++) {
    const int low = head * head_keys, high = low + head_keys;
    const int from = low / 8 * 8, to = round_up(high, 8);
    auto inside = [&](int j, int q) { return grad.column(j, q) >= low && grad.column(j, q) < high; };
    float total[2] = {};
    grad.each(from, to, [&](int j, int q, float g) {
      if (inside(j, q)) total[q / 2] += weights.sum[j][q] * g;
    });
    for (float& t : total) t = quad_sum(t);
    grad.each(from, to, [&](int j, int q, float& g) {
      if (inside(j, q)) g = weights.sum[j][q] * (g - total[q / 2]);
    });
  }
}

// blockIdx.x is split and image. Tiles of 16 tokens for each of `warps` warps; then each of all warps sums 16 rows of
// dM over the tile.
struct QueryPass {
  SelfAttentionArguments arguments;
  Splits splits;
  int warps, at_once;  // see OutputPass
  const void* folded;
  void* grad_query;  // [batch, tokens, keys rounded up to 16]
  float *partials, *output_bias;
};

template <class E>
struct QueryMemory {
  using T = typename E::Store;
  int stride, wide_stride, query_bias, query_weight, folded, tokens, grad_output, all;

  BOTH explicit QueryMemory(const QueryPass& p) {
    const SelfAttentionArguments& a = p.arguments;
    constexpr int SIZE = sizeof(T);
    Carver m;
    stride = tile_stride<T>(a.channels);
    wide_stride = tile_stride<T>(max(a.channels, a.keys));
    query_bias = m.take(MOST_FEATURES * 4);
    query_weight = folded = m.take(p.at_once * stride * SIZE);
    if (p.at_once >= a.keys) folded = m.take(p.at_once * stride * SIZE);
    tokens = m.take(16 * p.warps * wide_stride * SIZE);  // X, then P
    const int parts = WARPS * MOST_CHANNELS * 4;         // in its place in the end
    grad_output = m.take(max(16 * p.warps * stride * SIZE, parts));
    all = m.used;
  }
};

template <class E>
KERNEL(THREADS, 1)
self_attention_query_backward_kernel(const QueryPass pass) {
  using T = typename E::Store;
  const SelfAttentionArguments& a = pass.arguments;
  DYNAMIC_SHARED(memory);
  const QueryMemory<E> m(pass);
  const int warp = threadIdx.x / 32, channels = round_up(a.channels, 16), keys = round_up(a.keys, 16);
  float* query_bias = reinterpret_cast<float*>(memory + m.query_bias);
  T* tokens = reinterpret_cast<T*>(memory + m.tokens);
  T* grad_output = reinterpret_cast<T*>(memory + m.grad_output);
  const std::int64_t image = blockIdx.x / pass.splits.count, split = blockIdx.x % pass.splits.count;
  const std::int64_t end = min(a.tokens, (split + 1) * pass.splits.size);
  const ImageTokens<T> x(a.x, image, a.channels), y(a.grad_output, image, a.channels);
  const LaneNorm<T> norm(a.parameters.norm_weight, a.parameters.norm_bias, a.channels, a.eps);
  const LaneNorm<T> none({nullptr, false}, {nullptr, false}, a.channels, 0);

  const StagedRows<T> query_weight{reinterpret_cast<T*>(memory + m.query_weight),
                                   m.stride,
                                   pass.at_once,
                                   a.parameters.query_weight,
                                   a.keys,
                                   a.channels};
  const Parameter matrix{static_cast<const T*>(pass.folded) + image * a.keys * a.channels, false};
  const StagedRows<T> folded{
      reinterpret_cast<T*>(memory + m.folded), m.stride, pass.at_once, matrix, a.keys, a.channels};
  stage_vector<T>(query_bias, a.parameters.query_bias, a.keys, MOST_FEATURES);
  if (query_weight.resident()) {
    query_weight.stage_from(0);
    folded.stage_from(0);
    commit();
    wait<0>();
  }
  __syncthreads();

  WarpProduct<MOST_CHANNELS / 8> grad_folded;  // rows 16 warp and on of dM
  grad_folded.clear();
  float output_bias[4] = {};
  const int step = 16 * pass.warps, row = 16 * warp;
  const bool works = warp < pass.warps;
  for (std::int64_t tile = split * pass.splits.size; tile < end; tile += step) {
    const std::int64_t token = tile + row;
    if (works)
      for (int half = 0; half < 16; half += 8) {
        auto exists = [&](int i) { return token + half + i < end; };
        TokenRows<T, 8> rows, grads;
        rows.fetch(x, token + half, 1, end);
        grads.fetch(y, token + half, 1, end);
        rows.put(norm, tokens + (row + half) * m.wide_stride, m.wide_stride, 1, exists, [](int, const float (&)[4]) {});
        grads.put(none, grad_output + (row + half) * m.stride, m.stride, 1, exists, [&](int, const float (&g)[4]) {
          for (int i = 0; i < 4; i++) output_bias[i] += g[i];
        });
      }
    __syncwarp();

    WideProduct p, grad;  // logits, then weights and the gradient of these, then of the logits
    p.clear();
    grad.clear();
    query_weight.each([&](int first, int last) {
      if (works)
        p.template add<E, false, true>(tokens, m.wide_stride, row, query_weight.tile, m.stride, -first, channels, first,
                                       last);
    });
    if (works) {
      p.each(0, keys, [&](int j, int q, float& logit) { logit += query_bias[p.column(j, q)]; });
      softmax_heads(p, a.heads, a.keys / a.heads);
      __syncwarp();
      p.put(tokens, m.wide_stride, row, keys);
    }
    folded.each([&](int first, int last) {
      if (works)
        grad.template add<E, false, true>(grad_output, m.stride, row, folded.tile, m.stride, -first, channels, first,
                                          last);
    });
    if (works) {
      softmax_heads_backward(p, grad, a.heads, a.keys / a.heads);
      grad.each(0, keys, [&](int j, int q, float g) {
        if (token + grad.row(q) >= end) return;
        const int feature = grad.column(j, q);
        T* to = static_cast<T*>(pass.grad_query) + (image * a.tokens + token + grad.row(q)) * keys + feature;
        write(to, from_float<T>(feature < a.keys ? g : 0.0f));
      });
    }
    __syncthreads();
    if (row < keys)
      grad_folded.template add<E, true, false>(tokens, m.wide_stride, row, grad_output, m.stride, 0, step, 0, channels);
    __syncthreads();
  }

  const std::int64_t part = image * pass.splits.count + split;
  grad_folded.each(0, channels, [&](int j, int q, float sum) {
    const int feature = row + grad_folded.row(q), channel = grad_folded.column(j, q);
    if (feature < a.keys && channel < a.channels)
      write(pass.partials + (part * a.keys + feature) * a.channels + channel, sum);
  });
  write_column_sums(pass.output_bias + part * a.channels, output_bias, reinterpret_cast<float*>(grad_output),
                    a.channels);
}

// A block walks over tiles of `rows` tokens, of one image after the other. Its partial sums are of dW_q and dW_k [keys,
// channels], of the query bias, and of weight and bias of the norm.
struct TokenPass {
  SelfAttentionArguments arguments;
  int rows;     // 64 or 32
  int at_once;  // rows of W_q, W_k and dA that are on the chip at a time: all, or CHUNK
  const void *grad_query, *grad_key_tokens;
  const float* delta;
  float* partials;
  std::int64_t size;  // of a block's

  BOTH std::int64_t tiles_of_image() const { return ceil_div(arguments.tokens, rows); }
};

template <class E>
struct TokenMemory {
  using T = typename E::Store;
  using Sum = typename SumEngine<E>::Store;
  int stride, sum_stride, chunk_stride, grad_stride;
  int maxima, delta, kept, column_sums, query_weight, key_weight, grad_key_tokens;
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
    kept = m.take(p.rows * 4);
    column_sums = m.take(p.rows / 16 * CHUNK * 2 * 4);
    query_weight = m.take(p.at_once * stride * size);
    key_weight = m.take(p.at_once * stride * size);
    grad_key_tokens = m.take(p.at_once * sum_stride * static_cast<int>(sizeof(Sum)));
    tokens = grad_x = m.used;  // the gradient of x takes the place of the tiles that it is made from
    m.take(p.rows * stride * size);
    grad_query = m.take(p.rows * chunk_stride * size);
    weights = m.take(p.rows * chunk_stride * size);
    grad_key = m.take(p.rows * chunk_stride * size);
    all = max(m.used, max(grad_x + p.rows * grad_stride * 4, grad_x + WARPS * MOST_CHANNELS * 4));
  }
};

template <class E>
KERNEL(THREADS, 1)
self_attention_token_backward_kernel(const TokenPass pass) {
  using T = typename E::Store;
  using Sum = SumEngine<E>;
  const SelfAttentionArguments& a = pass.arguments;
  DYNAMIC_SHARED(memory);
  const TokenMemory<E> m(pass);
  auto tile = [&](int at) { return reinterpret_cast<T*>(memory + at); };
  auto floats = [&](int at) { return reinterpret_cast<float*>(memory + at); };
  T *tokens = tile(m.tokens), *grad_query = tile(m.grad_query), *weights = tile(m.weights),
    *grad_key = tile(m.grad_key);
  float *maxima = floats(m.maxima), *delta = floats(m.delta), *kept = floats(m.kept), *grad_x = floats(m.grad_x);

  const int warp = threadIdx.x / 32, channels = round_up(a.channels, 16), keys = round_up(a.keys, 16);
  const int row_units = pass.rows / 16, row = warp % row_units * 16;  // of the tile, for this warp
  const int unit = warp / row_units;                                  // among the warps with these rows
  const bool resident = pass.at_once >= a.keys, one_tile = a.tokens <= pass.rows;
  const std::int64_t tiles = a.batch * pass.tiles_of_image();
  const std::int64_t first_tile = tiles * blockIdx.x / gridDim.x, end_tile = tiles * (blockIdx.x + 1) / gridDim.x;
  const LaneNorm<T> norm(a.parameters.norm_weight, a.parameters.norm_bias, a.channels, a.eps);

  const StagedRows<T> query_weight{tile(m.query_weight),      m.stride, pass.at_once,
                                   a.parameters.query_weight, a.keys,   a.channels};
  const StagedRows<T> key_weight{tile(m.key_weight),      m.stride, pass.at_once,
                                 a.parameters.key_weight, a.keys,   a.channels};
  StagedRows<typename Sum::Store> grad_key_tokens{reinterpret_cast<typename Sum::Store*>(memory + m.grad_key_tokens),
                                                  m.sum_stride,
                                                  pass.at_once,
                                                  {nullptr, false},
                                                  a.keys,
                                                  a.channels};
  if (resident) {
    query_weight.stage_from(0);
    key_weight.stage_from(0);
  }

  WarpProduct<4> grad_query_weight[CHUNKS], grad_key_weight[CHUNKS];  // 16 features x 32 channels of each chunk
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    grad_query_weight[c].clear();
    grad_key_weight[c].clear();
  }
  const int feature_row = warp % 2 * 16, feature_column = warp / 2 * 32;
  float query_bias[CHUNKS] = {}, norm_weight[4] = {}, norm_bias[4] = {};

  std::int64_t image = -1;
  for (std::int64_t t = first_tile; t < end_tile; t++) {
    const std::int64_t first = t % pass.tiles_of_image() * pass.rows;
    if (const std::int64_t now = t / pass.tiles_of_image(); now != image) {
      image = now;
      grad_key_tokens.matrix.data =
          static_cast<const typename Sum::Store*>(pass.grad_key_tokens) + image * a.keys * a.channels;
      if (resident) grad_key_tokens.stage_from(0);
      for (int j = threadIdx.x; j < a.keys; j += THREADS) {
        const float largest = read(a.state.key_max + image * a.keys + j);
        maxima[j] = largest == -INFINITY ? 0.0f : largest;
        delta[j] = read(pass.delta + image * a.keys + j);
      }
    }
    const ImageTokens<T> x(a.x, image, a.channels), grad_output(a.grad_output, image, a.channels),
        output(a.grad_x, image, a.channels);
    for (int r = warp; r < pass.rows; r += 4 * WARPS) {
      TokenRows<T, 4> rows;
      rows.fetch(x, first + r, WARPS, a.tokens);
      rows.put(
          norm, tokens + r * m.stride, m.stride, WARPS, [&](int i) { return first + r + i * WARPS < a.tokens; },
          [](int, const float (&)[4]) {});
    }
    for (int r = threadIdx.x; r < pass.rows; r += THREADS)
      kept[r] = first + r < a.tokens && is_kept(a.mask, image, first + r) ? 1.0f : 0.0f;

    WarpProduct<8> grad;  // of x: rows `row` and on, 16 row_units columns
    grad.clear();
    const int column = unit * 16 * row_units, columns = min(16 * row_units, channels - column);
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      const int feature = chunk * CHUNK, features = min(CHUNK, keys - feature), start = resident ? feature : 0;
      if (features <= 0) break;
      const int count = a.tokens - first < pass.rows ? static_cast<int>(a.tokens - first) : pass.rows;
      copy_rows<16>(grad_query, m.chunk_stride,
                    static_cast<const T*>(pass.grad_query) + (image * a.tokens + first) * keys + feature, keys, count,
                    features, THREADS);
      for (int i = threadIdx.x; i < (pass.rows - count) * features; i += THREADS)
        grad_query[(count + i / features) * m.chunk_stride + i % features] = from_float<T>(0.0f);
      if (!resident) {
        query_weight.stage_from(feature);
        key_weight.stage_from(feature);
        grad_key_tokens.stage_from(feature);
      }
      commit();
      wait<0>();
      __syncthreads();

      WarpProduct<2> e, g;  // 16 rows and features: logits, then weights; the gradient of the weights, then of the keys
      const int own = 16 * unit;
      if (own < features) {
        e.clear();
        g.clear();
        e.template add<E, false, true>(tokens, m.stride, row, key_weight.tile + start * m.stride, m.stride, own,
                                       channels, 0, 16);
        g.template add<Sum, false, true>(tokens, m.stride, row, grad_key_tokens.tile + start * m.sum_stride,
                                         m.sum_stride, own, channels, 0, 16);
        e.each(0, 16, [&](int j, int q, float& logit) {
          const int f = feature + own + e.column(j, q);
          const bool counts = kept[row + e.row(q)] != 0 && f < a.keys;
          logit = counts ? as_operand<E>(expf(logit - maxima[f])) : 0.0f;
        });
      }
      // With all tokens in one tile the sums are those of the tile itself: errors cancel, and a single token has all
      // the weight exactly.
      float* column_sums = floats(m.column_sums);
      if (one_tile) {
        if (own < features) {
#pragma unroll
          for (int j = 0; j < 2; j++)
            for (int q = 0; q < 2; q++) {
              float total = e.sum[j][q] + e.sum[j][q + 2];
              float grads = (kept[row + e.row(q)] != 0 ? e.sum[j][q] * g.sum[j][q] : 0.0f) +
                            (kept[row + e.row(q + 2)] != 0 ? e.sum[j][q + 2] * g.sum[j][q + 2] : 0.0f);
              for (int bits = 4; bits < 32; bits *= 2) {
                total += __shfl_xor_sync(ALL_LANES, total, bits);
                grads += __shfl_xor_sync(ALL_LANES, grads, bits);
              }
              float* at = column_sums + (row / 16 * CHUNK + own + e.column(j, q)) * 2;
              if (threadIdx.x % 32 < 4) {
                at[0] = total;
                at[1] = grads;
              }
            }
        }
        __syncthreads();
        for (int j = threadIdx.x; j < features; j += THREADS) {
          float total = 0, grads = 0;
          for (int u = 0; u < row_units; u++) {
            total += column_sums[(u * CHUNK + j) * 2];
            grads += column_sums[(u * CHUNK + j) * 2 + 1];
          }
          delta[feature + j] = total == 0 ? 0.0f : grads / total;
        }
        __syncthreads();
      }
      if (own < features)
        e.each(0, 16, [&](int j, int q, float weight) {
          const int r = row + e.row(q), f = own + e.column(j, q);
          const bool counts = kept[r] != 0 && feature + f < a.keys;
          weights[r * m.chunk_stride + f] = from_float<T>(weight);
          grad_key[r * m.chunk_stride + f] = from_float<T>(counts ? weight * (g.sum[j][q] - delta[feature + f]) : 0.0f);
        });
      float bias = 0;
      if (static_cast<int>(threadIdx.x % 32) < features)
        for (int r = warp; r < pass.rows; r += WARPS)
          bias += to_float(grad_query[r * m.chunk_stride + threadIdx.x % 32]);
      query_bias[chunk] += bias;
      __syncthreads();

      if (feature_row < features && feature_column < channels) {
        const int to = min(32, channels - feature_column);
        grad_query_weight[chunk].template add<E, true, false>(grad_query, m.chunk_stride, feature_row, tokens, m.stride,
                                                              feature_column, pass.rows, 0, to);
        grad_key_weight[chunk].template add<E, true, false>(grad_key, m.chunk_stride, feature_row, tokens, m.stride,
                                                            feature_column, pass.rows, 0, to);
      }
      if (columns > 0) {
        grad.template add<E, false, false>(grad_query, m.chunk_stride, row, query_weight.tile + start * m.stride,
                                           m.stride, column, features, 0, columns);
        grad.template add<Sum, false, false>(weights, m.chunk_stride, row, grad_key_tokens.tile + start * m.sum_stride,
                                             m.sum_stride, column, features, 0, columns);
        grad.template add<E, false, false>(grad_key, m.chunk_stride, row, key_weight.tile + start * m.stride, m.stride,
                                           column, features, 0, columns);
      }
      __syncthreads();
    }

    grad.each(0, columns, [&](int j, int q, float sum) {
      grad_x[(row + grad.row(q)) * m.grad_stride + column + grad.column(j, q)] = sum;
    });
    __syncthreads();
    for (int r = warp; r < pass.rows && first + r < a.tokens; r += WARPS) {
      float g[4];
      for (int i = 0; i < 4; i++)
        g[i] = lane_channel() + i < a.channels ? grad_x[r * m.grad_stride + lane_channel() + i] : 0.0f;
      if (norm.on) {
        float normalized[4];
        widen(normalized, x.load(first + r, lane_channel()));
        const float rstd = norm.normalize(normalized);
        float mean = 0, slope = 0;
        for (int i = 0; i < 4; i++) {
          norm_weight[i] += g[i] * normalized[i];
          norm_bias[i] += g[i];
          g[i] *= norm.weight[i];
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
    __syncthreads();
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
  float* parts = floats(m.grad_x);
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++)
    parts[warp * MOST_FEATURES + chunk * CHUNK + threadIdx.x % 32] = query_bias[chunk];
  __syncthreads();
  sums += 2 * matrix;
  for (int j = threadIdx.x; j < a.keys; j += THREADS) {
    float sum = 0;
    for (int w = 0; w < WARPS; w++) sum += parts[w * MOST_FEATURES + j];
    write(sums + j, sum);
  }
  write_column_sums(sums + a.keys, norm_weight, parts, a.channels);
  write_column_sums(sums + a.keys + a.channels, norm_bias, parts, a.channels);
}

// What the sums over tokens, images and splits are added from.
class GradientSums {
 public:
  void add(const ParameterGradient& to, const float* partials, std::int64_t splits, std::int64_t stride,
           std::int64_t count) {
    if (to.data) sums_.sum[sums_.count++] = {partials, splits, stride, count, to.data, to.wide};
  }
  const Sums& sums() const { return sums_; }

 private:
  Sums sums_{};
};

template <class E>
struct Backward {
  using T = typename E::Store;
  const SelfAttentionArguments& a;
  QueryPass query{};
  TokenPass token{};
  int blocks = 0, groups = 0;  // of the token pass; of images
  std::int64_t value_size = 0, bytes = 0;
  float *grad_folded = nullptr, *grad_context = nullptr, *delta = nullptr, *value_partials = nullptr;
  T *folded = nullptr, *grad_query = nullptr;
  typename SumEngine<E>::Store* grad_key_tokens = nullptr;

  explicit Backward(const SelfAttentionArguments& arguments) : a(arguments) {
    query.arguments = token.arguments = a;
    if (!fit()) {
      bytes = OUT_OF_SHARED_MEMORY;
      return;
    }
    query.splits = Splits::of(a.batch, a.tokens, 16 * query.warps);
    const std::int64_t tiles = a.batch * token.tiles_of_image();
    blocks = static_cast<int>(tiles < processors() ? tiles : processors());
    groups = static_cast<int>(a.batch < 32 ? a.batch : 32);
    const std::int64_t keys = a.keys, channels = a.channels, values = a.values, parts = a.batch * query.splits.count;
    token.size = 2 * keys * channels + keys + 2 * channels;
    value_size = 2 * channels * values + values;

    ScratchCarver scratch(a.scratch);
    folded = scratch.take<T>(a.batch * keys * channels);
    grad_query = scratch.take<T>(a.batch * a.tokens * round_up(a.keys, 16));
    grad_key_tokens = scratch.take<typename SumEngine<E>::Store>(a.batch * keys * channels);
    grad_folded = scratch.take<float>(a.batch * keys * channels);
    grad_context = scratch.take<float>(a.batch * keys * values / a.heads);
    delta = scratch.take<float>(a.batch * keys);
    query.partials = scratch.take<float>(parts * keys * channels);
    query.output_bias = scratch.take<float>(parts * channels);
    token.partials = scratch.take<float>(blocks * token.size);
    value_partials = scratch.take<float>(groups * value_size);
    bytes = scratch.used();
    query.folded = folded;
    query.grad_query = grad_query;
    token.grad_query = grad_query;
    token.grad_key_tokens = grad_key_tokens;
    token.delta = delta;
  }

  bool fit() {
    const int all = round_up(a.keys, 16), some = all < CHUNK ? all : CHUNK;
    auto query_fits = [&](int warps, int at_once) {
      query.warps = warps;
      query.at_once = at_once;
      return QueryMemory<E>(query).all <= most_shared();
    };
    auto token_fits = [&](int rows, int at_once) {
      token.rows = rows;
      token.at_once = at_once;
      return TokenMemory<E>(token).all <= most_shared();
    };
    return (query_fits(WARPS, all) || query_fits(WARPS, some) || query_fits(WARPS / 2, all) ||
            query_fits(WARPS / 2, some)) &&
           (token_fits(64, all) || token_fits(64, some) || token_fits(32, all) || token_fits(32, some));
  }

  int sum_gradients(void* stream) const {
    const auto& g = a.gradients;
    const std::int64_t keys = a.keys, channels = a.channels, values = a.values, matrix = keys * channels;
    GradientSums sums;
    const float* of_tokens = token.partials;
    sums.add(g.query_weight, of_tokens, blocks, token.size, matrix);
    sums.add(g.key_weight, of_tokens + matrix, blocks, token.size, matrix);
    sums.add(g.query_bias, of_tokens + 2 * matrix, blocks, token.size, keys);
    sums.add(g.norm_weight, of_tokens + 2 * matrix + keys, blocks, token.size, channels);
    sums.add(g.norm_bias, of_tokens + 2 * matrix + keys + channels, blocks, token.size, channels);
    sums.add(g.output_weight, value_partials, groups, value_size, channels * values);
    sums.add(g.value_weight, value_partials + channels * values, groups, value_size, channels * values);
    sums.add(g.value_bias, value_partials + 2 * channels * values, groups, value_size, values);
    sums.add(g.output_bias, query.output_bias, a.batch * query.splits.count, channels, channels);
    return sum_partials<T>(sums.sums(), stream);
  }

  int run(Engine engine, void* stream) const {
    if (bytes < 0) return static_cast<int>(bytes);
    if (int error = fold<T>(Fold{a, nullptr, nullptr, nullptr, nullptr, 0, folded}, stream)) return error;
    if (int error =
            launch<self_attention_query_backward_kernel<E>>(dim3(static_cast<unsigned>(a.batch * query.splits.count)),
                                                            THREADS, QueryMemory<E>(query).all, stream, query))
      return error;
    const FoldBackward back{a, query.partials, query.splits.count, grad_folded, grad_context, grad_key_tokens, delta,
                            0};
    if (int error = fold_backward(engine, back, stream)) return error;
    if (int error = value_gradients({a, grad_folded, grad_context, value_partials, value_size, groups}, stream))
      return error;
    if (int error = launch<self_attention_token_backward_kernel<E>>(dim3(blocks), THREADS, TokenMemory<E>(token).all,
                                                                    stream, token))
      return error;
    return sum_gradients(stream);
  }
};

}  // namespace

int self_attention_backward(Engine engine, const SelfAttentionArguments& arguments, void* stream) {
  return with_engine(engine, [&](auto e) { return Backward<decltype(e)>(arguments).run(engine, stream); });
}

std::int64_t self_attention_backward_scratch(Engine engine, const SelfAttentionArguments& arguments) {
  return with_engine(engine, [&](auto e) { return Backward<decltype(e)>(arguments).bytes; });
}

}  // namespace msformer::gpu
