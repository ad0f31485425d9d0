// MixFFN, backward: the statistics of Z, and the second half (see mix_ffn_backward.h).
#include "mix_ffn_backward.h"

namespace msformer::gpu {
namespace {

template <class E>
struct StatisticsMemory : HiddenMemory<E, 1> {
  using C = Config<E>;
  int z_mean, z_squares, z;

  BOTH explicit StatisticsMemory(const MixFFN& a) : HiddenMemory<E, 1>(a) {
    z_mean = this->floats(C::PIXELS);
    z_squares = this->floats(C::PIXELS);
    z = this->values(C::PIXELS * C::STRIDE);
  }
};

template <class E>
KERNEL(Config<E>::THREADS, 1)
mix_ffn_statistics_kernel(const MixFFN a) {
  using C = Config<E>;
  using T = typename E::Store;
  DYNAMIC_SHARED(memory);
  const StatisticsMemory<E> m(a);
  const Shared<T> shared{memory};
  float *mean = shared.floats(m.mean), *rstd = shared.floats(m.rstd);
  float *z_mean = shared.floats(m.z_mean), *z_squares = shared.floats(m.z_squares);
  T *tokens = shared.tile(m.tokens), *hidden = shared.tile(m.hidden), *z = shared.tile(m.z);
  const MixFFNArguments& g = a.arguments;

  const Place place = Place::of<C>(a, blockIdx.x);
  prepare_tokens<E, 1>(a, place, mean, rstd, tokens, m.token_stride);
  for (int first = 0; first < g.hidden; first += C::CHUNK) {
    make_hidden<E, 1>(a, place, mean, rstd, tokens, m.token_stride, shared.tile(m.weights), hidden, first);
    convolve<E, 0, false>(a, hidden, first, [&](int p, int c, float x) { z[p * C::STRIDE + c] = from_float<T>(x); });
    __syncthreads();
    join_statistics(z_mean, z_squares, z, C::STRIDE, C::PIXELS, min(C::CHUNK, g.hidden - first), first, C::WARPS);
    __syncthreads();
  }
  for (int p = threadIdx.x; p < C::PIXELS; p += C::THREADS) {
    const std::int64_t token = place.template token<Region<E, 0>>(a, p);
    if (token < 0) continue;
    float* to = a.scratch.statistics + (place.image * g.height * g.width + token) * 2;
    write(to, z_mean[p]);
    write(to + 1, reciprocal_deviation(z_squares[p] / static_cast<float>(g.hidden), g.eps));
  }
}

// The tile of tokens also holds grad_output, all channels of it or one chunk, and later those of the block.
template <class E>
struct SecondMemory : HiddenMemory<E, 1> {
  using C = Config<E>;
  int z_mean, z_rstd, sums, z, activated, gradient;

  BOTH explicit SecondMemory(const MixFFN& a)
      : HiddenMemory<E, 1>(a, max(a.channel_chunk, min(a.arguments.channels, C::OUT)), a.channel_chunk * C::STRIDE) {
    z_mean = this->floats(C::PIXELS);
    z_rstd = this->floats(C::PIXELS);
    sums = this->floats(2 * C::THREADS);
    z = this->values(C::PIXELS * C::STRIDE);
    activated = this->values(C::PIXELS * C::STRIDE);
    gradient = this->values(C::PIXELS * C::STRIDE);
  }
};

template <class E>
KERNEL(Config<E>::THREADS, 1)
mix_ffn_second_backward_kernel(const MixFFN a) {
  using C = Config<E>;
  using T = typename E::Store;
  DYNAMIC_SHARED(memory);
  const SecondMemory<E> m(a);
  const Shared<T> shared{memory};
  float *mean = shared.floats(m.mean), *rstd = shared.floats(m.rstd);
  float *z_mean = shared.floats(m.z_mean), *z_rstd = shared.floats(m.z_rstd);
  T *tokens = shared.tile(m.tokens), *hidden = shared.tile(m.hidden), *weights = shared.tile(m.weights);
  T *z = shared.tile(m.z), *activated = shared.tile(m.activated), *gradient = shared.tile(m.gradient);
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
    prepare_tokens<E, 1>(a, place, mean, rstd, tokens, m.token_stride);
    if (norm)
      for (int p = threadIdx.x; p < C::PIXELS; p += C::THREADS) {
        const std::int64_t token = token_of(p);
        z_mean[p] = token < 0 ? 0 : read(a.scratch.statistics + (before + token) * 2);
        z_rstd[p] = token < 0 ? 0 : read(a.scratch.statistics + (before + token) * 2 + 1);
      }
    make_hidden<E, 1>(a, place, mean, rstd, tokens, m.token_stride, weights, hidden, first);
    convolve<E, 0, false>(a, hidden, first, [&](int p, int c, float x) { z[p * C::STRIDE + c] = from_float<T>(x); });

    Product<E, C::PIXELS, C::CHUNK, 4, C::WARPS> grad_activated;
    grad_activated.clear();
    for (int k = 0; k < g.channels; k += a.channel_chunk) {
      const int columns = min(a.channel_chunk, g.channels - k);
      load_region<E, 0>(a, place, g.grad_output, tokens, m.pixel_stride, k, columns,
                        [](float x, int, int) { return x; });
      stage(weights, C::STRIDE, round_up(columns, 16), C::CHUNK, w.fc2_weight, g.hidden, k, first, columns, channels,
            C::THREADS);
      commit();
      wait<0>();
      __syncthreads();
      grad_activated.template add<false, false>(tokens, m.pixel_stride, weights, C::STRIDE, round_up(columns, 16));
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
      load_region<E, 0>(a, place, g.grad_output, tokens, m.pixel_stride, out, outs,
                        [](float x, int, int) { return x; });
    __syncthreads();
    T* grads = tokens + (a.channel_chunk < g.channels ? 0 : out);
    fc2_gradient.template add<true, false>(grads, m.pixel_stride, activated, C::STRIDE, C::PIXELS, outs, channels);

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
  sum_groups<C>(shared.floats(m.sums), scale_sum, [&](int c, float sum) {
    if (c < channels) write(rest + first + c, sum);
  });
  sum_groups<C>(shared.floats(m.sums), shift_sum, [&](int c, float sum) {
    if (c < channels) write(rest + g.hidden + first + c, sum);
  });
}

}  // namespace

int mix_ffn_statistics(Engine engine, MixFFN a, void* stream) {
  return with_engine(engine, [&](auto e) -> int {
    using E = decltype(e);
    const int shared = choose_chunk<StatisticsMemory<E>>(a);
    if (!shared) return OUT_OF_SHARED_MEMORY;
    const dim3 grid(static_cast<unsigned>(count_tiles<Config<E>>(a)));
    return launch<mix_ffn_statistics_kernel<E>>(grid, Config<E>::THREADS, shared, stream, a);
  });
}

int mix_ffn_second_backward(Engine engine, MixFFN a, void* stream) {
  return with_engine(engine, [&](auto e) -> int {
    using E = decltype(e);
    const int shared = choose_chunk<SecondMemory<E>>(a);
    if (!shared) return OUT_OF_SHARED_MEMORY;
    return launch<mix_ffn_second_backward_kernel<E>>(grid_of_halves<E>(a), Config<E>::THREADS, shared, stream, a);
  });
}

}  // namespace msformer::gpu
