// What the passes of MixFFN share: tiles of pixels with a halo, and the way from x to Z on the chip.
//
//     U = LayerNorm(x) W_1 + b_1,   Z = dw3x3(U) + b_d [+ U],   output = act([LayerNorm](Z)) W_2 + b_2 [+ x]
//
// A block works on a tile of pixels and walks over chunks of hidden channels. U of a chunk is made for the tile and its
// halo (zero outside the image), Z from it; neither leaves the chip. Values between products are rounded to the dtype
// of x, as they are between the layers of the unfused network.
#pragma once

#include "tokens.h"

namespace msformer::gpu {

// What the passes of the backward hand on (mix_ffn_backward.cu), for all tokens in order.
struct MixFFNScratch {
  void* grad_normalized;  // [tokens, hidden] in the dtype of x: the gradient of LayerNorm(Z), or of Z without a norm
  void* grad_hidden;      // [tokens, hidden]: of U
  float* statistics;      // [tokens, 2]: mean and 1 / deviation of Z
  float* row_sums;  // [chunks, tokens, 2]: sums over the channels of a chunk that the gradient of a LayerNorm needs
  float *second_partials, *first_partials, *token_partials;  // sums over a split: of fc2, of fc1, of what is by token
  std::int64_t second_size, first_size, token_size;          // of a split
  float* token_gradients;  // where the pass over tokens has no room on the chip: a tile's gradients of LayerNorm(x)
  ExactSum* token_sums;    // and its sums over tokens, of each split
  int splits, token_splits;
};

struct MixFFN {
  MixFFNArguments arguments;  // see api.h
  int channel_chunk;          // channels of x that are on the chip at a time, a multiple of 16
  bool keep;                  // forward: Z of all hidden channels stays on the chip between the two walks over them
  MixFFNScratch scratch;      // backward
};

DEV float activate(ActivationFunction f, float x) {
  if (f == ActivationFunction::relu) return x > 0 || x != x ? x : 0.0f;
  if (f == ActivationFunction::gelu) return 0.5f * x * (1 + erff(x * 0.70710678118654752f));
  if (f == ActivationFunction::identity) return x;
  if (f == ActivationFunction::silu) return x / (1 + expf(-x));
  if (f == ActivationFunction::hardswish) return x <= -3 ? x * 0.0f : x >= 3 ? x : x * (x + 3) / 6;
  if (f == ActivationFunction::relu6) return x < 0 ? 0.0f : x > 6 ? 6.0f : x;
  return 0.5f * x * (1 + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}

DEV float activation_slope(ActivationFunction f, float x) {
  if (f == ActivationFunction::relu) return x > 0 || x != x ? 1.0f : 0.0f;
  if (f == ActivationFunction::gelu)
    return 0.5f * (1 + erff(x * 0.70710678118654752f)) + x * 0.39894228040143268f * expf(-0.5f * x * x);
  if (f == ActivationFunction::identity) return 1;
  if (f == ActivationFunction::silu) {
    const float sigmoid = 1 / (1 + expf(-x));
    return sigmoid + x * sigmoid * (1 - sigmoid);
  }
  if (f == ActivationFunction::hardswish) return x <= -3 ? 0.0f : x >= 3 ? 1.0f : x / 3 + 0.5f;
  if (f == ActivationFunction::relu6) return x <= 0 || x >= 6 ? 0.0f : 1.0f;
  const float inner = 0.79788456080286536f * (x + 0.044715f * x * x * x), t = tanhf(inner);
  return 0.5f * (1 + t) + 0.5f * x * (1 - t) * (1 + t) * 0.79788456080286536f * (1 + 3 * 0.044715f * x * x);
}

// The tile and how it is worked on, by the size of a value: hidden channels at a time, warps.
template <class E>
struct Config {
  static constexpr bool NARROW = sizeof(typename E::Store) == 2;
  static constexpr int HEIGHT = 8, WIDTH = NARROW ? 16 : 8, PIXELS = HEIGHT * WIDTH;
  static constexpr int CHUNK = NARROW ? 64 : 32, WARPS = 8, THREADS = 32 * WARPS;
  static constexpr int OUT = 128;  // output channels of a block
  static constexpr int STRIDE = tile_stride<typename E::Store>(CHUNK);
};

// The tile with HALO pixels around it; rows of its tiles in shared memory are its pixels, row by row.
template <class E, int HALO>
struct Region {
  using C = Config<E>;
  static constexpr int AROUND = HALO;
  static constexpr int HEIGHT = C::HEIGHT + 2 * HALO, WIDTH = C::WIDTH + 2 * HALO, PIXELS = HEIGHT * WIDTH;
  static constexpr int ROWS = (PIXELS + 15) / 16 * 16;
};

// Where a block works.
struct Place {
  std::int64_t image;
  int top, left;

  template <class C>
  DEV static Place of(const MixFFN& a, std::int64_t tile) {
    const int across = ceil_div(a.arguments.width, C::WIDTH), down = ceil_div(a.arguments.height, C::HEIGHT);
    const int in_image = static_cast<int>(tile % (static_cast<std::int64_t>(across) * down));
    return {tile / (static_cast<std::int64_t>(across) * down), in_image / across * C::HEIGHT,
            in_image % across * C::WIDTH};
  }

  // The token of a pixel of the region, or -1 outside the image.
  template <class R>
  DEV std::int64_t token(const MixFFN& a, int pixel) const {
    const int y = top + pixel / R::WIDTH - R::AROUND, x = left + pixel % R::WIDTH - R::AROUND;
    if (pixel >= R::PIXELS || y < 0 || x < 0 || y >= a.arguments.height || x >= a.arguments.width) return -1;
    return static_cast<std::int64_t>(y) * a.arguments.width + x;
  }
};

template <class C>
BOTH std::int64_t count_tiles(const MixFFN& a) {
  return a.arguments.batch * ceil_div(a.arguments.width, C::WIDTH) * ceil_div(a.arguments.height, C::HEIGHT);
}

// Where things lie in the shared memory of a block that makes U of a tile with HALO pixels around it. A pass takes more
// from the carver. The tile of tokens may also hold `columns` channels of the tile's pixels, and that of weights
// `weight_values`.
template <class E, int HALO>
struct HiddenMemory {
  using C = Config<E>;
  using R = Region<E, HALO>;
  using T = typename E::Store;
  Carver carver;
  int token_stride;  // of the tile of tokens
  int pixel_stride;  // of the same, if it holds pixels
  int mean, rstd, tokens, hidden, weights;

  BOTH explicit HiddenMemory(const MixFFN& a, int columns = 0, int weight_values = 0) {
    token_stride = tile_stride<T>(a.channel_chunk);
    pixel_stride = tile_stride<T>(columns);
    mean = floats(R::ROWS);
    rstd = floats(R::ROWS);
    tokens = values(max(R::ROWS * token_stride, C::PIXELS * pixel_stride));
    hidden = values(R::ROWS * C::STRIDE);
    weights = values(max(C::CHUNK * token_stride, weight_values));
  }
  BOTH int floats(int count) { return carver.take(count * 4); }
  BOTH int values(int count) { return carver.take(count * static_cast<int>(sizeof(T))); }
  BOTH int all() const { return carver.used; }
};

// Channels [first, first + columns) of tokens of the region, `change(value, row, channel)`, in a tile of a multiple of
// 16 columns; zeros outside the image and in the padding. Four neighbouring channels at a time.
template <class E, int HALO, class Change>
DEV void load_region(const MixFFN& a, const Place& place, const Tokens& from, typename E::Store* tile, int stride,
                     int first, int columns, Change change) {
  using R = Region<E, HALO>;
  using T = typename E::Store;
  const ImageTokens<T> image(from, place.image, a.arguments.channels);
  const int groups = round_up(columns, 16) / 4;
  const bool along_tokens = from.channel_stride != 1 && from.token_stride == 1;
  for (int i = threadIdx.x; i < R::ROWS * groups; i += Config<E>::THREADS) {
    const int r = along_tokens ? i % R::ROWS : i / groups, c = 4 * (along_tokens ? i / R::ROWS : i % groups);
    const std::int64_t token = place.template token<R>(a, r);
    float x[4] = {};
    if (token >= 0 && c < columns) widen(x, image.load(token, first + c));
    Four<T> four;
#pragma unroll
    for (int q = 0; q < 4; q++)
      four.value[q] = from_float<T>(token >= 0 && c + q < columns ? change(x[q], r, first + c + q) : 0.0f);
    *reinterpret_cast<Four<T>*>(tile + r * stride + c) = four;
  }
}

template <class E>
DEV float normalize_token(const MixFFN& a, float x, float mean, float rstd, int channel) {
  const auto& norm = a.arguments.parameters.norm;
  if (!norm.weight.data) return x;
  x = (x - mean) * rstd * element<typename E::Store>(norm.weight, channel);
  return norm.bias.data ? x + element<typename E::Store>(norm.bias, channel) : x;
}

// LayerNorm(x) of channels [first, first + columns) of the region; row_of(r) says which statistics belong to a row.
template <class E, int HALO, class RowOf>
DEV void load_tokens(const MixFFN& a, const Place& place, const float* mean, const float* rstd, RowOf row_of,
                     typename E::Store* tile, int stride, int first, int columns) {
  load_region<E, HALO>(a, place, a.arguments.x, tile, stride, first, columns, [&](float x, int r, int c) {
    return normalize_token<E>(a, x, mean[row_of(r)], rstd[row_of(r)], c);
  });
}

// Mean and 1 / deviation over the channels of each token of the region, where there is a norm; and LayerNorm(x) in the
// tile of tokens, if it holds all channels. All threads of the block wait here.
template <class E, int HALO>
DEV void prepare_tokens(const MixFFN& a, const Place& place, float* mean, float* rstd, typename E::Store* tile,
                        int stride) {
  using C = Config<E>;
  using R = Region<E, HALO>;
  using T = typename E::Store;
  const int channels = a.arguments.channels;
  const bool norm = a.arguments.parameters.norm.weight.data, whole = a.channel_chunk >= channels;
  auto exists = [&](int r) { return place.template token<R>(a, r) >= 0; };
  if (whole) {
    load_region<E, HALO>(a, place, a.arguments.x, tile, stride, 0, channels, [](float x, int, int) { return x; });
    __syncthreads();
    if (!norm) return;
    row_statistics(
        mean, rstd, R::ROWS, channels, a.arguments.eps, C::WARPS,
        [&](int r, int c) { return to_float(tile[r * stride + c]); }, exists);
    __syncthreads();
    for (int i = threadIdx.x; i < R::ROWS * channels; i += C::THREADS) {
      const int r = i / channels, c = i % channels;
      T& x = tile[r * stride + c];
      if (exists(r)) x = from_float<T>(normalize_token<E>(a, to_float(x), mean[r], rstd[r], c));
    }
  } else if (norm) {
    row_statistics(
        mean, rstd, R::ROWS, channels, a.arguments.eps, C::WARPS,
        [&](int r, int c) {
          return to_float(read(address<T>(a.arguments.x, place.image, place.template token<R>(a, r), c)));
        },
        exists);
  }
  __syncthreads();
}

// U of hidden channels [first, first + CHUNK), for the region, in a tile of stride Config::STRIDE. `tokens` holds
// `channel_chunk` channels; if those are all of them it must be filled already. All threads of the block wait here.
template <class E, int HALO>
DEV void make_hidden(const MixFFN& a, const Place& place, const float* mean, const float* rstd,
                     typename E::Store* tokens, int tokens_stride, typename E::Store* weights,
                     typename E::Store* hidden, int first) {
  using C = Config<E>;
  using R = Region<E, HALO>;
  using T = typename E::Store;
  const int channels = min(C::CHUNK, a.arguments.hidden - first), stride = tile_stride<T>(a.channel_chunk);
  Product<E, R::ROWS, C::CHUNK, 4, C::WARPS> u;
  u.clear();
  for (int k = 0; k < a.arguments.channels; k += a.channel_chunk) {
    const int columns = min(a.channel_chunk, a.arguments.channels - k);
    stage(weights, stride, C::CHUNK, round_up(columns, 16), a.arguments.parameters.fc1_weight, a.arguments.channels,
          first, k, channels, columns, C::THREADS);
    commit();
    if (a.arguments.channels > a.channel_chunk)
      load_tokens<E, HALO>(a, place, mean, rstd, [](int r) { return r; }, tokens, tokens_stride, k, columns);
    wait<0>();
    __syncthreads();
    u.template add<false, true>(tokens, tokens_stride, weights, stride, round_up(columns, 16), R::ROWS, channels);
    __syncthreads();
  }
  u.each([&](int r, int c, float sum) {
    const bool exists = c < channels && place.template token<R>(a, r) >= 0;
    const float bias =
        exists && a.arguments.parameters.fc1_bias.data ? element<T>(a.arguments.parameters.fc1_bias, first + c) : 0.0f;
    hidden[r * C::STRIDE + c] = from_float<T>(exists ? sum + bias : 0.0f);
  });
  __syncthreads();
}

// The depthwise convolution of a chunk of hidden channels, from a tile with one pixel more around it than the region of
// HALO pixels: out(pixel, channel, sum) for every pixel, in and out of the image. BACKWARD: with the taps turned round
// and without the bias, from the gradient of Z to that of U. A thread keeps its channel, and walks along rows.
template <class E, int HALO, bool BACKWARD, class Out>
DEV void convolve(const MixFFN& a, const typename E::Store* tile, int first, Out out) {
  using C = Config<E>;
  using T = typename E::Store;
  using Inner = Region<E, HALO>;
  using Outer = Region<E, HALO + 1>;
  const auto& w = a.arguments.parameters;
  const int c = threadIdx.x % C::CHUNK, channel = first + c;
  if (channel >= a.arguments.hidden) return;
  float taps[9];
  for (int t = 0; t < 9; t++) taps[t] = element<T>(w.dw_weight, channel * 9ll + (BACKWARD ? 8 - t : t));
  const float bias = !BACKWARD && w.dw_bias.data ? element<T>(w.dw_bias, channel) : 0.0f;
  for (int y = threadIdx.x / C::CHUNK; y < Inner::HEIGHT; y += C::THREADS / C::CHUNK) {
    const T* row = tile + y * Outer::WIDTH * C::STRIDE + c;
    float column[3][3];  // the last three columns of the tile
    for (int x = 0; x < 2; x++)
      for (int dy = 0; dy < 3; dy++) column[x][dy] = to_float(row[(dy * Outer::WIDTH + x) * C::STRIDE]);
    for (int x = 0; x < Inner::WIDTH; x++) {
      for (int dy = 0; dy < 3; dy++) column[2][dy] = to_float(row[(dy * Outer::WIDTH + x + 2) * C::STRIDE]);
      float sum = bias;
      for (int dy = 0; dy < 3; dy++)
        for (int dx = 0; dx < 3; dx++) sum = fmaf(taps[dy * 3 + dx], column[dx][dy], sum);
      out(y * Inner::WIDTH + x, c, a.arguments.skip ? sum + column[1][1] : sum);
      for (int dy = 0; dy < 3; dy++) {
        column[0][dy] = column[1][dy];
        column[1][dy] = column[2][dy];
      }
    }
  }
}

// LayerNorm of Z, where there is one.
template <class T>
DEV float normalize_hidden(const MixFFN& a, float z, float mean, float rstd, int channel) {
  const auto& w = a.arguments.parameters;
  if (!w.hidden_norm.weight.data) return z;
  z = (z - mean) * rstd * element<T>(w.hidden_norm.weight, channel);
  return w.hidden_norm.bias.data ? z + element<T>(w.hidden_norm.bias, channel) : z;
}

// Joins the mean and squared deviations of a chunk of `columns` values of each row to those of the `before` ones
// already seen (Chan et al., 1983).
template <class T>
DEV void join_statistics(float* mean, float* squares, const T* tile, int stride, int rows, int columns, int before,
                         int warps) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int r = warp; r < rows; r += warps) {
    float sum = 0, square = 0;
    for (int c = lane; c < columns; c += 32) sum += to_float(tile[r * stride + c]);
    const float m = warp_sum(sum) / static_cast<float>(columns);
    for (int c = lane; c < columns; c += 32) {
      const float d = to_float(tile[r * stride + c]) - m;
      square += d * d;
    }
    square = warp_sum(square);
    if (lane == 0) {
      const float old = before ? mean[r] : 0.0f, difference = m - old;
      const float share = static_cast<float>(columns) / static_cast<float>(before + columns);
      mean[r] = old + difference * share;
      squares[r] = (before ? squares[r] : 0.0f) + square + difference * difference * share * static_cast<float>(before);
    }
  }
}

// Gives a pass the largest chunk of channels with which it fits into shared memory; returns the bytes that it needs
// then, 0 if none fits.
template <class Memory>
int choose_chunk(MixFFN& a) {
  for (a.channel_chunk = round_up(a.arguments.channels, 16); a.channel_chunk > 0; a.channel_chunk -= 16)
    if (const int bytes = Memory(a).all(); bytes <= most_shared()) return bytes;
  return 0;
}

}  // namespace msformer::gpu
