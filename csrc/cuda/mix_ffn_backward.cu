// MixFFN, backward. Everything is made again from x; between the passes only the gradients of Z and U go through
// memory.
//
// 1. statistics (with a hidden norm): mean and deviation of Z of each token.
// 2. second half, a block for a chunk of hidden channels and a split of the tiles: the gradient of LayerNorm(Z) (of Z,
// if
//    there is no norm), its sums over the chunk for each token, and the weight gradients of fc2 and of the hidden norm.
// 3. first half, likewise: the gradient of Z from these with a halo, that of U through the convolution, and the weight
//    gradients of fc1 and of the convolution.
// 4. tokens: the gradient of x through fc1 and the norm, for rows of tokens, and the sums over tokens that are left.
// 5. the partial sums of all splits, in a fixed order.
//
// Weight gradients stay in registers while a block walks over its tiles, so that each chunk of hidden channels has
// blocks of its own; they read x and grad_output again, which a large cache keeps.
#include "mix_ffn.h"

namespace msformer::gpu {
namespace {

// Tiles [begin, end) of a split.
struct Walk {
  std::int64_t begin, end;

  DEV Walk(std::int64_t tiles, int split, int splits)
      : begin(tiles * split / splits), end(tiles * (split + 1) / splits) {}
};

// Sums over the groups of threads that have the same channel, then `write(channel, sum)` by the first group.
template <class C, class Write>
DEV void sum_groups(float* shared, const ExactSum& mine, Write out) {
  __syncthreads();
  shared[threadIdx.x] = mine.total;
  shared[C::THREADS + threadIdx.x] = mine.lost;
  __syncthreads();
  if (threadIdx.x < C::CHUNK) {
    ExactSum all;
    for (int i = threadIdx.x; i < C::THREADS; i += C::CHUNK) {
      all.add(shared[i]);
      all.lost += shared[C::THREADS + i];
    }
    out(static_cast<int>(threadIdx.x), all.value());
  }
}

// ---- 1

template <class E>
struct StatisticsMemory {
  using C = Config<E>;
  using R = Region<E, 1>;
  int mean, rstd, z_mean, z_squares, tokens, hidden, z, fc1, all;

  BOTH explicit StatisticsMemory(const MixFFN& a) {
    constexpr int SIZE = sizeof(typename E::Store);
    const int stride = tile_stride<typename E::Store>(a.channel_chunk);
    Carver m;
    mean = m.take(R::ROWS * 4);
    rstd = m.take(R::ROWS * 4);
    z_mean = m.take(C::PIXELS * 4);
    z_squares = m.take(C::PIXELS * 4);
    tokens = m.take(R::ROWS * stride * SIZE);
    hidden = m.take(R::ROWS * C::STRIDE * SIZE);
    fc1 = m.take(C::CHUNK * stride * SIZE);
    z = m.take(C::PIXELS * C::STRIDE * SIZE);
    all = m.used;
  }
};

template <class E>
KERNEL(Config<E>::THREADS, 1)
mix_ffn_statistics_kernel(const MixFFN a) {
  using C = Config<E>;
  using T = typename E::Store;
  DYNAMIC_SHARED(memory);
  const StatisticsMemory<E> m(a);
  auto floats = [&](int at) { return reinterpret_cast<float*>(memory + at); };
  auto tile = [&](int at) { return reinterpret_cast<T*>(memory + at); };
  float *mean = floats(m.mean), *rstd = floats(m.rstd), *z_mean = floats(m.z_mean), *z_squares = floats(m.z_squares);
  const MixFFNArguments& g = a.arguments;

  const Place place = Place::of<C>(a, blockIdx.x);
  input_statistics<E, 1>(a, place, mean, rstd);
  __syncthreads();
  if (a.channel_chunk >= g.channels)
    load_tokens<E, 1>(
        a, place, mean, rstd, [](int r) { return r; }, tile(m.tokens), tile_stride<T>(a.channel_chunk), 0, g.channels);
  for (int first = 0; first < g.hidden; first += C::CHUNK) {
    make_hidden<E, 1>(a, place, mean, rstd, tile(m.tokens), tile_stride<T>(a.channel_chunk), tile(m.fc1),
                      tile(m.hidden), first);
    convolve<E, 0, false>(a, tile(m.hidden), first,
                          [&](int p, int c, float z) { tile(m.z)[p * C::STRIDE + c] = from_float<T>(z); });
    __syncthreads();
    join_statistics(z_mean, z_squares, tile(m.z), C::STRIDE, C::PIXELS, min(C::CHUNK, g.hidden - first), first,
                    C::WARPS);
    __syncthreads();
  }
  for (int p = threadIdx.x; p < C::PIXELS; p += C::THREADS) {
    const std::int64_t token = place.template token<Region<E, 0>>(a, p);
    if (token < 0) continue;
    float* to = a.scratch.statistics + (place.image * g.height * g.width + token) * 2;
    write(to, z_mean[p]);
    write(to + 1, rsqrtf(z_squares[p] / static_cast<float>(g.hidden) + g.eps));
  }
}

// ---- 2

template <class E>
struct SecondMemory {
  using C = Config<E>;
  using R = Region<E, 1>;
  int mean, rstd, z_mean, z_rstd, sums, tokens, hidden, z, activated, gradient, weights, all, stride;

  BOTH explicit SecondMemory(const MixFFN& a) {
    constexpr int SIZE = sizeof(typename E::Store);
    const int channels = round_up(a.arguments.channels, 16), out = channels < C::OUT ? channels : C::OUT;
    // the tile of tokens also holds grad_output, of all output channels of the block
    stride = tile_stride<typename E::Store>(a.channel_chunk > out ? a.channel_chunk : out);
    Carver m;
    mean = m.take(R::ROWS * 4);
    rstd = m.take(R::ROWS * 4);
    z_mean = m.take(C::PIXELS * 4);
    z_rstd = m.take(C::PIXELS * 4);
    sums = m.take(2 * C::THREADS * 4);
    tokens = m.take(R::ROWS * stride * SIZE);
    hidden = m.take(R::ROWS * C::STRIDE * SIZE);
    z = m.take(C::PIXELS * C::STRIDE * SIZE);
    activated = m.take(C::PIXELS * C::STRIDE * SIZE);
    gradient = m.take(C::PIXELS * C::STRIDE * SIZE);
    // of fc1 [CHUNK, channels] or of fc2 [channels, CHUNK]
    const int fc1 = C::CHUNK * tile_stride<typename E::Store>(a.channel_chunk), fc2 = a.channel_chunk * C::STRIDE;
    weights = m.take((fc1 > fc2 ? fc1 : fc2) * SIZE);
    all = m.used;
  }
};

template <class E>
KERNEL(Config<E>::THREADS, 1)
mix_ffn_second_backward_kernel(const MixFFN a) {
  using C = Config<E>;
  using T = typename E::Store;
  DYNAMIC_SHARED(memory);
  const SecondMemory<E> m(a);
  auto floats = [&](int at) { return reinterpret_cast<float*>(memory + at); };
  auto tile = [&](int at) { return reinterpret_cast<T*>(memory + at); };
  float *mean = floats(m.mean), *rstd = floats(m.rstd), *z_mean = floats(m.z_mean), *z_rstd = floats(m.z_rstd);
  T *tokens = tile(m.tokens), *hidden = tile(m.hidden), *z = tile(m.z), *activated = tile(m.activated),
    *gradient = tile(m.gradient), *weights = tile(m.weights);
  const MixFFNArguments& g = a.arguments;
  const auto& w = g.parameters;
  const bool norm = w.hidden_norm.weight.data != nullptr;

  const int first = blockIdx.x * C::CHUNK, channels = min(C::CHUNK, g.hidden - first);
  const int out = blockIdx.z * C::OUT, outs = min(C::OUT, g.channels - out);
  const bool writes = blockIdx.z == 0;  // blocks for further output channels make the rest again, but do not write it
  const int channel = threadIdx.x % C::CHUNK, group = threadIdx.x / C::CHUNK;
  Product<E, C::OUT, C::CHUNK, 4, C::WARPS> fc2_gradient;
  fc2_gradient.clear();
  ExactSum scale_sum, shift_sum;  // gradients of the hidden norm

  const Walk walk(count_tiles<C>(a), blockIdx.y, a.scratch.splits);
  for (std::int64_t t = walk.begin; t < walk.end; t++) {
    const Place place = Place::of<C>(a, t);
    const std::int64_t before = place.image * g.height * g.width;  // tokens of other images
    auto token_of = [&](int p) { return place.template token<Region<E, 0>>(a, p); };
    input_statistics<E, 1>(a, place, mean, rstd);
    if (norm)
      for (int p = threadIdx.x; p < C::PIXELS; p += C::THREADS) {
        const std::int64_t token = token_of(p);
        z_mean[p] = token < 0 ? 0 : read(a.scratch.statistics + (before + token) * 2);
        z_rstd[p] = token < 0 ? 0 : read(a.scratch.statistics + (before + token) * 2 + 1);
      }
    __syncthreads();
    if (a.channel_chunk >= g.channels)
      load_tokens<E, 1>(a, place, mean, rstd, [](int r) { return r; }, tokens, m.stride, 0, g.channels);
    make_hidden<E, 1>(a, place, mean, rstd, tokens, m.stride, weights, hidden, first);
    convolve<E, 0, false>(a, hidden, first, [&](int p, int c, float x) { z[p * C::STRIDE + c] = from_float<T>(x); });

    Product<E, C::PIXELS, C::CHUNK, 4, C::WARPS> grad_activated;
    grad_activated.clear();
    for (int k = 0; k < g.channels; k += a.channel_chunk) {
      const int columns = min(a.channel_chunk, g.channels - k);
      load_region<E, 0>(a, place, g.grad_output, tokens, m.stride, k, columns, [](float x, int, int) { return x; });
      stage(weights, C::STRIDE, round_up(columns, 16), C::CHUNK, w.fc2_weight, g.hidden, k, first, columns, channels,
            C::THREADS);
      commit();
      wait<0>();
      __syncthreads();
      grad_activated.template add<false, false>(tokens, m.stride, weights, C::STRIDE, round_up(columns, 16));
      __syncthreads();
    }
    grad_activated.each([&](int p, int c, float sum) {
      float slope = 0, value = 0;
      if (c < channels && token_of(p) >= 0) {
        const float x = normalize_hidden<T>(a, to_float(z[p * C::STRIDE + c]), z_mean[p], z_rstd[p], first + c);
        value = activate(g.activation, x);
        slope = sum * activation_slope(g.activation, x);
      }
      activated[p * C::STRIDE + c] = from_float<T>(value);
      gradient[p * C::STRIDE + c] = from_float<T>(slope);
    });
    if (a.channel_chunk < g.channels)
      load_region<E, 0>(a, place, g.grad_output, tokens, m.stride, out, outs, [](float x, int, int) { return x; });
    __syncthreads();
    fc2_gradient.template add<true, false>(tokens, m.stride, activated, C::STRIDE, C::PIXELS, outs, channels);

    if (writes) {
      const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
      for (int p = warp; p < C::PIXELS; p += C::WARPS) {
        const std::int64_t token = token_of(p);
        if (token < 0) continue;
        float sum = 0, product = 0;
        for (int c = lane; c < channels; c += 32) {
          const T rounded = gradient[p * C::STRIDE + c];
          write(static_cast<T*>(a.scratch.grad_normalized) + (before + token) * g.hidden + first + c, rounded);
          if (!norm) continue;
          const float grad = to_float(rounded) * element<T>(w.hidden_norm.weight, first + c);
          sum += grad;
          product += grad * (to_float(z[p * C::STRIDE + c]) - z_mean[p]) * z_rstd[p];
        }
        if (!norm) continue;
        sum = warp_sum(sum);
        product = warp_sum(product);
        if (lane == 0) {
          float* to = a.scratch.row_sums + ((blockIdx.x * g.batch * g.height * g.width) + before + token) * 2;
          write(to, sum);
          write(to + 1, product);
        }
      }
      if (norm && channel < channels)
        for (int p = group; p < C::PIXELS; p += C::THREADS / C::CHUNK) {
          if (token_of(p) < 0) continue;
          const float grad = to_float(gradient[p * C::STRIDE + channel]);
          shift_sum.add(grad);
          scale_sum.add(grad * (to_float(z[p * C::STRIDE + channel]) - z_mean[p]) * z_rstd[p]);
        }
    }
    __syncthreads();
  }

  float* partial = a.scratch.second_partials + blockIdx.y * a.scratch.second_size;
  fc2_gradient.each([&](int c, int h, float sum) {
    if (c < outs && h < channels) write(partial + static_cast<std::int64_t>(out + c) * g.hidden + first + h, sum);
  });
  if (!writes || !norm) return;
  float* rest = partial + static_cast<std::int64_t>(g.channels) * g.hidden;
  sum_groups<C>(floats(m.sums), scale_sum, [&](int c, float sum) {
    if (c < channels) write(rest + first + c, sum);
  });
  sum_groups<C>(floats(m.sums), shift_sum, [&](int c, float sum) {
    if (c < channels) write(rest + g.hidden + first + c, sum);
  });
}

// ---- 3

template <class E, bool NORM>
struct FirstMemory {
  using C = Config<E>;
  using R = Region<E, NORM ? 2 : 1>;
  int mean, rstd, z_mean, z_rstd, z_sum, z_product, sums, tokens, hidden, mixed, gradient, weights, all, stride;

  BOTH explicit FirstMemory(const MixFFN& a) {
    constexpr int SIZE = sizeof(typename E::Store), AROUND = Region<E, 1>::ROWS;
    const int channels = round_up(a.arguments.channels, 16), in = channels < C::OUT ? channels : C::OUT;
    stride = tile_stride<typename E::Store>(a.channel_chunk > in ? a.channel_chunk : in);
    Carver m;
    mean = m.take(R::ROWS * 4);
    rstd = m.take(R::ROWS * 4);
    z_mean = m.take(NORM ? AROUND * 4 : 0);
    z_rstd = m.take(NORM ? AROUND * 4 : 0);
    z_sum = m.take(NORM ? AROUND * 4 : 0);
    z_product = m.take(NORM ? AROUND * 4 : 0);
    sums = m.take(2 * C::THREADS * 4);
    tokens = m.take(R::ROWS * stride * SIZE);
    hidden = m.take(R::ROWS * C::STRIDE * SIZE);
    mixed = m.take(AROUND * C::STRIDE * SIZE);
    gradient = m.take(C::PIXELS * C::STRIDE * SIZE);
    weights = m.take(C::CHUNK * tile_stride<typename E::Store>(a.channel_chunk) * SIZE);
    all = m.used;
  }
};

template <class E, bool NORM>
KERNEL(Config<E>::THREADS, 1)
mix_ffn_first_backward_kernel(const MixFFN a) {
  using C = Config<E>;
  using T = typename E::Store;
  using M = FirstMemory<E, NORM>;
  using R = typename M::R;
  using Ring = Region<E, 1>;  // where the gradient of Z is needed
  DYNAMIC_SHARED(memory);
  const M m(a);
  auto floats = [&](int at) { return reinterpret_cast<float*>(memory + at); };
  auto tile = [&](int at) { return reinterpret_cast<T*>(memory + at); };
  float *mean = floats(m.mean), *rstd = floats(m.rstd), *z_mean = floats(m.z_mean), *z_rstd = floats(m.z_rstd),
        *z_sum = floats(m.z_sum), *z_product = floats(m.z_product);
  T *tokens = tile(m.tokens), *hidden = tile(m.hidden), *mixed = tile(m.mixed), *gradient = tile(m.gradient);
  const MixFFNArguments& g = a.arguments;
  const auto& w = g.parameters;

  const int first = blockIdx.x * C::CHUNK, channels = min(C::CHUNK, g.hidden - first);
  const int in = blockIdx.z * C::OUT, ins = min(C::OUT, g.channels - in);
  const bool writes = blockIdx.z == 0;
  const int channel = threadIdx.x % C::CHUNK, group = threadIdx.x / C::CHUNK;
  Product<E, C::CHUNK, C::OUT, 4, C::WARPS> fc1_gradient;
  fc1_gradient.clear();
  ExactSum taps[9], mixed_sum, hidden_sum;

  const Walk walk(count_tiles<C>(a), blockIdx.y, a.scratch.splits);
  for (std::int64_t t = walk.begin; t < walk.end; t++) {
    const Place place = Place::of<C>(a, t);
    const std::int64_t before = place.image * g.height * g.width;
    input_statistics<E, R::AROUND>(a, place, mean, rstd);
    if constexpr (NORM)
      for (int p = threadIdx.x; p < Ring::PIXELS; p += C::THREADS) {
        const std::int64_t token = place.template token<Ring>(a, p);
        if (token < 0) continue;
        float sum = 0, product = 0;
        for (int k = 0; k < ceil_div(g.hidden, C::CHUNK); k++) {
          const float* from = a.scratch.row_sums + ((k * g.batch * g.height * g.width) + before + token) * 2;
          sum += read(from);
          product += read(from + 1);
        }
        z_mean[p] = read(a.scratch.statistics + (before + token) * 2);
        z_rstd[p] = read(a.scratch.statistics + (before + token) * 2 + 1);
        z_sum[p] = sum / static_cast<float>(g.hidden);
        z_product[p] = product / static_cast<float>(g.hidden);
      }
    __syncthreads();
    if (a.channel_chunk >= g.channels)
      load_tokens<E, R::AROUND>(a, place, mean, rstd, [](int r) { return r; }, tokens, m.stride, 0, g.channels);
    make_hidden<E, R::AROUND>(a, place, mean, rstd, tokens, m.stride, tile(m.weights), hidden, first);

    auto gradient_at = [&](std::int64_t token, int c) {
      return to_float(read(static_cast<const T*>(a.scratch.grad_normalized) + (before + token) * g.hidden + first + c));
    };
    if constexpr (NORM) {
      const float scale = channel < channels ? element<T>(w.hidden_norm.weight, first + channel) : 0.0f;
      convolve<E, 1, false>(a, hidden, first, [&](int p, int c, float x) {
        const std::int64_t token = place.template token<Ring>(a, p);
        float sum = 0;
        if (token >= 0) {
          const float normalized = (to_float(from_float<T>(x)) - z_mean[p]) * z_rstd[p];
          sum = z_rstd[p] * (gradient_at(token, c) * scale - z_sum[p] - normalized * z_product[p]);
        }
        mixed[p * C::STRIDE + c] = from_float<T>(sum);
      });
    } else {
      for (int i = threadIdx.x; i < Ring::PIXELS * C::CHUNK; i += C::THREADS) {
        const int p = i / C::CHUNK, c = i % C::CHUNK;
        const std::int64_t token = place.template token<Ring>(a, p);
        if (c < channels) mixed[p * C::STRIDE + c] = from_float<T>(token < 0 ? 0.0f : gradient_at(token, c));
      }
    }
    __syncthreads();

    convolve<E, 0, true>(a, mixed, first, [&](int p, int c, float x) {
      const std::int64_t token = place.template token<Region<E, 0>>(a, p);
      const T rounded = from_float<T>(token < 0 ? 0.0f : x);
      gradient[p * C::STRIDE + c] = rounded;
      if (token < 0) return;
      hidden_sum.add(x);
      if (writes) write(static_cast<T*>(a.scratch.grad_hidden) + (before + token) * g.hidden + first + c, rounded);
    });
    if (channel < channels) {
      for (int p = group; p < C::PIXELS; p += C::THREADS / C::CHUNK) {
        const int y = p / C::WIDTH, x = p % C::WIDTH;
        const float grad = to_float(mixed[((y + 1) * Ring::WIDTH + x + 1) * C::STRIDE + channel]);
        const T* from = hidden + ((y + R::AROUND - 1) * R::WIDTH + x + R::AROUND - 1) * C::STRIDE + channel;
        mixed_sum.add(grad);
        for (int dy = 0; dy < 3; dy++)
          for (int dx = 0; dx < 3; dx++) taps[dy * 3 + dx].add(grad * to_float(from[(dy * R::WIDTH + dx) * C::STRIDE]));
      }
    } else {
      for (int p = group; p < C::PIXELS; p += C::THREADS / C::CHUNK)
        gradient[p * C::STRIDE + channel] = from_float<T>(0.0f);
    }
    load_tokens<E, 0>(
        a, place, mean, rstd, [](int p) { return (p / C::WIDTH + R::AROUND) * R::WIDTH + p % C::WIDTH + R::AROUND; },
        tokens, m.stride, in, ins);
    __syncthreads();
    fc1_gradient.template add<true, false>(gradient, C::STRIDE, tokens, m.stride, C::PIXELS, channels, ins);
    __syncthreads();
  }

  float* partial = a.scratch.first_partials + blockIdx.y * a.scratch.first_size;
  fc1_gradient.each([&](int h, int c, float sum) {
    if (h < channels && c < ins) write(partial + static_cast<std::int64_t>(first + h) * g.channels + in + c, sum);
  });
  if (!writes) return;
  float* rest = partial + static_cast<std::int64_t>(g.channels) * g.hidden;  // 9 taps a channel, then two sums
  for (int t = 0; t < 9; t++)
    sum_groups<C>(floats(m.sums), taps[t], [&](int c, float sum) {
      if (c < channels) write(rest + (first + c) * 9ll + t, sum);
    });
  sum_groups<C>(floats(m.sums), mixed_sum, [&](int c, float sum) {
    if (c < channels) write(rest + g.hidden * 9ll + first + c, sum);
  });
  sum_groups<C>(floats(m.sums), hidden_sum, [&](int c, float sum) {
    if (c < channels) write(rest + g.hidden * 10ll + first + c, sum);
  });
}

// ---- 4

constexpr int TOKEN_WARPS = 8, TOKEN_THREADS = 32 * TOKEN_WARPS;

template <class E, int ROWS>
struct TokenMemory {
  using C = Config<E>;
  static constexpr int OUT_STRIDE = C::OUT + 16 / static_cast<int>(sizeof(typename E::Store));
  int mean, rstd, sums, gradient, hidden, fc1, all, stride;

  BOTH explicit TokenMemory(const MixFFN& a) {
    constexpr int SIZE = sizeof(typename E::Store);
    stride = a.arguments.channels + 4;
    Carver m;
    mean = m.take(ROWS * 4);
    rstd = m.take(ROWS * 4);
    sums = m.take(3 * a.arguments.channels * static_cast<int>(sizeof(ExactSum)));
    gradient = m.take(ROWS * stride * 4);
    hidden = m.take(ROWS * C::STRIDE * SIZE);
    fc1 = m.take(C::CHUNK * OUT_STRIDE * SIZE);
    all = m.used;
  }
};

template <class E, int ROWS>
KERNEL(TOKEN_THREADS, 1)
mix_ffn_token_backward_kernel(const MixFFN a) {
  using C = Config<E>;
  using T = typename E::Store;
  using M = TokenMemory<E, ROWS>;
  DYNAMIC_SHARED(memory);
  const M m(a);
  auto floats = [&](int at) { return reinterpret_cast<float*>(memory + at); };
  auto tile = [&](int at) { return reinterpret_cast<T*>(memory + at); };
  float *mean = floats(m.mean), *rstd = floats(m.rstd), *gradient = floats(m.gradient);
  ExactSum* sums = reinterpret_cast<ExactSum*>(memory + m.sums);
  const MixFFNArguments& g = a.arguments;
  const auto& w = g.parameters;
  const bool norm = w.norm.weight.data != nullptr;
  const std::int64_t tokens = static_cast<std::int64_t>(g.height) * g.width, all = g.batch * tokens;
  for (int i = threadIdx.x; i < 3 * g.channels; i += TOKEN_THREADS) sums[i] = ExactSum{};

  const Walk walk(ceil_div(all, ROWS), blockIdx.x, a.scratch.token_splits);
  for (std::int64_t t = walk.begin; t < walk.end; t++) {
    const std::int64_t start = t * ROWS;
    const int rows = static_cast<int>(min(static_cast<std::int64_t>(ROWS), all - start));
    auto x_at = [&](int r, int c) {
      return to_float(read(address<T>(g.x, (start + r) / tokens, (start + r) % tokens, c)));
    };
    auto grad_output_at = [&](int r, int c) {
      return to_float(read(address<T>(g.grad_output, (start + r) / tokens, (start + r) % tokens, c)));
    };
    if (norm) row_statistics(mean, rstd, rows, g.channels, g.eps, TOKEN_WARPS, x_at, [](int) { return true; });
    for (int in = 0; in < g.channels; in += C::OUT) {
      const int ins = min(C::OUT, g.channels - in);
      Product<E, ROWS, C::OUT, 2, TOKEN_WARPS> product;
      product.clear();
      for (int first = 0; first < g.hidden; first += C::CHUNK) {
        const int channels = min(C::CHUNK, g.hidden - first);
        stage(tile(m.hidden), C::STRIDE, ROWS, C::CHUNK, Parameter{a.scratch.grad_hidden, false}, g.hidden, start,
              first, rows, channels, TOKEN_THREADS);
        stage(tile(m.fc1), M::OUT_STRIDE, C::CHUNK, round_up(ins, 16), w.fc1_weight, g.channels, first, in, channels,
              ins, TOKEN_THREADS);
        commit();
        wait<0>();
        __syncthreads();
        product.template add<false, false>(tile(m.hidden), C::STRIDE, tile(m.fc1), M::OUT_STRIDE,
                                           round_up(channels, 16), rows, ins);
        __syncthreads();
      }
      product.each([&](int r, int c, float sum) {
        if (r < rows && c < ins) gradient[r * m.stride + in + c] = sum;
      });
    }
    __syncthreads();
    // sums over the tokens, each by the thread of its channel
    for (int c = threadIdx.x; c < g.channels; c += TOKEN_THREADS) {
      ExactSum output_sum = sums[c], scale_sum = sums[g.channels + c], shift_sum = sums[2 * g.channels + c];
      for (int r = 0; r < rows; r++) {
        output_sum.add(grad_output_at(r, c));
        if (!norm) continue;
        const float grad = gradient[r * m.stride + c];
        shift_sum.add(grad);
        scale_sum.add(grad * (x_at(r, c) - mean[r]) * rstd[r]);
      }
      sums[c] = output_sum;
      sums[g.channels + c] = scale_sum;
      sums[2 * g.channels + c] = shift_sum;
    }
    __syncthreads();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int r = warp; r < rows; r += TOKEN_WARPS) {
      float sum = 0, product = 0;
      if (norm) {
        for (int c = lane; c < g.channels; c += 32) {
          const float grad = gradient[r * m.stride + c] * element<T>(w.norm.weight, c);
          sum += grad;
          product += grad * (x_at(r, c) - mean[r]) * rstd[r];
        }
        sum = warp_sum(sum) / static_cast<float>(g.channels);
        product = warp_sum(product) / static_cast<float>(g.channels);
      }
      for (int c = lane; c < g.channels; c += 32) {
        float grad = gradient[r * m.stride + c];
        if (norm) {
          const float normalized = (x_at(r, c) - mean[r]) * rstd[r];
          grad = rstd[r] * (grad * element<T>(w.norm.weight, c) - sum - normalized * product);
        }
        if (g.residual) grad += grad_output_at(r, c);
        write(address<T>(g.grad_x, (start + r) / tokens, (start + r) % tokens, c), from_float<T>(grad));
      }
    }
    __syncthreads();
  }
  float* partial = a.scratch.token_partials + blockIdx.x * a.scratch.token_size;
  for (int i = threadIdx.x; i < 3 * g.channels; i += TOKEN_THREADS) write(partial + i, sums[i].value());
}

// ---- the host

// Scratch memory from `start` on; returns its bytes.
template <class E>
std::int64_t place_scratch(MixFFN& a, void* start) {
  using C = Config<E>;
  const MixFFNArguments& g = a.arguments;
  const std::int64_t tokens = g.batch * g.height * g.width, matrix = static_cast<std::int64_t>(g.channels) * g.hidden;
  const int chunks = ceil_div(g.hidden, C::CHUNK), blocks = chunks * ceil_div(g.channels, C::OUT);
  const bool norm = g.parameters.hidden_norm.weight.data != nullptr;
  MixFFNScratch& s = a.scratch;
  s.splits = static_cast<int>(min(count_tiles<C>(a), static_cast<std::int64_t>(ceil_div(2 * processors(), blocks))));
  s.token_splits = static_cast<int>(min(ceil_div(tokens, std::int64_t{64}), std::int64_t{2} * processors()));
  s.second_size = matrix + (norm ? 2 * g.hidden : 0);
  s.first_size = matrix + 11ll * g.hidden;
  s.token_size = 3ll * g.channels;
  std::int64_t used = 0;
  auto take = [&](std::int64_t bytes) {
    char* at = static_cast<char*>(start) + used;
    used += (bytes + 127) / 128 * 128;
    return static_cast<void*>(at);
  };
  auto take_floats = [&](std::int64_t count) { return static_cast<float*>(take(count * 4)); };
  constexpr int SIZE = sizeof(typename E::Store);
  s.grad_normalized = take(tokens * g.hidden * SIZE);
  s.grad_hidden = take(tokens * g.hidden * SIZE);
  s.statistics = take_floats(norm ? tokens * 2 : 0);
  s.row_sums = take_floats(norm ? tokens * 2 * chunks : 0);
  s.second_partials = take_floats(s.splits * s.second_size);
  s.first_partials = take_floats(s.splits * s.first_size);
  s.token_partials = take_floats(s.token_splits * s.token_size);
  return used;
}

template <class E, class Memory>
int largest_chunk(MixFFN& a) {
  a.channel_chunk = largest_channel_chunk(a.arguments.channels, [&](int chunk) {
    a.channel_chunk = chunk;
    return Memory(a).all;
  });
  return a.channel_chunk ? Memory(a).all : 0;
}

template <class E>
int launch_tokens(const MixFFN& a, void* stream) {
  const dim3 grid(a.scratch.token_splits);
  if (const int shared = TokenMemory<E, 64>(a).all; shared <= most_shared())
    return launch<mix_ffn_token_backward_kernel<E, 64>>(grid, TOKEN_THREADS, shared, stream, a);
  if (const int shared = TokenMemory<E, 16>(a).all; shared <= most_shared())
    return launch<mix_ffn_token_backward_kernel<E, 16>>(grid, TOKEN_THREADS, shared, stream, a);
  return OUT_OF_SHARED_MEMORY;
}

template <class E, bool NORM>
int launch_first(MixFFN& a, dim3 grid, void* stream) {
  const int shared = largest_chunk<E, FirstMemory<E, NORM>>(a);
  if (!shared) return OUT_OF_SHARED_MEMORY;
  return launch<mix_ffn_first_backward_kernel<E, NORM>>(grid, Config<E>::THREADS, shared, stream, a);
}

template <class E>
int sum_all(const MixFFN& a, void* stream) {
  const MixFFNArguments& g = a.arguments;
  const MixFFNScratch& s = a.scratch;
  const std::int64_t matrix = static_cast<std::int64_t>(g.channels) * g.hidden;
  Sums sums{};
  auto add = [&](const float* from, std::int64_t splits, std::int64_t size, std::int64_t count,
                 const ParameterGradient& to) {
    if (to.data) sums.sum[sums.count++] = {from, splits, size, count, to.data, to.wide};
  };
  const float *second = s.second_partials + matrix, *first = s.first_partials + matrix;
  add(s.first_partials, s.splits, s.first_size, matrix, g.gradients.fc1_weight);
  add(first, s.splits, s.first_size, 9ll * g.hidden, g.gradients.dw_weight);
  add(first + 9ll * g.hidden, s.splits, s.first_size, g.hidden, g.gradients.dw_bias);
  add(first + 10ll * g.hidden, s.splits, s.first_size, g.hidden, g.gradients.fc1_bias);
  add(s.second_partials, s.splits, s.second_size, matrix, g.gradients.fc2_weight);
  add(second, s.splits, s.second_size, g.hidden, g.gradients.hidden_norm.weight);
  add(second + g.hidden, s.splits, s.second_size, g.hidden, g.gradients.hidden_norm.bias);
  add(s.token_partials, s.token_splits, s.token_size, g.channels, g.gradients.fc2_bias);
  add(s.token_partials + g.channels, s.token_splits, s.token_size, g.channels, g.gradients.norm.weight);
  add(s.token_partials + 2 * g.channels, s.token_splits, s.token_size, g.channels, g.gradients.norm.bias);
  return sum_partials<typename E::Store>(sums, stream);
}

template <class E>
int backward(const MixFFNArguments& arguments, void* stream) {
  using C = Config<E>;
  MixFFN a{arguments, 0, false, {}};
  place_scratch<E>(a, arguments.scratch);
  const bool norm = arguments.parameters.hidden_norm.weight.data != nullptr;
  const dim3 grid(ceil_div(arguments.hidden, C::CHUNK), a.scratch.splits, ceil_div(arguments.channels, C::OUT));
  if (norm) {
    const int shared = largest_chunk<E, StatisticsMemory<E>>(a);
    if (!shared) return OUT_OF_SHARED_MEMORY;
    const dim3 tiles(static_cast<unsigned>(count_tiles<C>(a)));
    if (int error = launch<mix_ffn_statistics_kernel<E>>(tiles, C::THREADS, shared, stream, a)) return error;
  }
  const int shared = largest_chunk<E, SecondMemory<E>>(a);
  if (!shared) return OUT_OF_SHARED_MEMORY;
  if (int error = launch<mix_ffn_second_backward_kernel<E>>(grid, C::THREADS, shared, stream, a)) return error;
  if (int error = norm ? launch_first<E, true>(a, grid, stream) : launch_first<E, false>(a, grid, stream)) return error;
  if (int error = launch_tokens<E>(a, stream)) return error;
  return sum_all<E>(a, stream);
}

}  // namespace

int mix_ffn_backward(Engine engine, const MixFFNArguments& arguments, void* stream) {
  return with_engine(engine, [&](auto e) { return backward<decltype(e)>(arguments, stream); });
}

std::int64_t mix_ffn_backward_scratch(Engine engine, const MixFFNArguments& arguments) {
  return with_engine(engine, [&](auto e) {
    MixFFN a{arguments, 0, false, {}};
    return place_scratch<decltype(e)>(a, nullptr);
  });
}

}  // namespace msformer::gpu
