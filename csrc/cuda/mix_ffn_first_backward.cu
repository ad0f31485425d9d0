// MixFFN, backward: the first half (see mix_ffn_backward.h).
#include "mix_ffn_backward.h"

namespace msformer::gpu {
namespace {

// The tile of tokens later holds LayerNorm(x) of the tile's pixels alone, in the channels of the block.
template <class E, bool NORM>
struct FirstMemory : HiddenMemory<E, NORM ? 2 : 1> {
  using C = Config<E>;
  int z_mean, z_rstd, z_sum, z_product, sums, mixed, gradient;

  BOTH explicit FirstMemory(const MixFFN& a) : HiddenMemory<E, NORM ? 2 : 1>(a, min(a.arguments.channels, C::OUT)) {
    constexpr int AROUND = Region<E, 1>::ROWS;
    z_mean = this->floats(NORM ? AROUND : 0);
    z_rstd = this->floats(NORM ? AROUND : 0);
    z_sum = this->floats(NORM ? AROUND : 0);
    z_product = this->floats(NORM ? AROUND : 0);
    sums = this->floats(2 * C::THREADS);
    mixed = this->values(AROUND * C::STRIDE);
    gradient = this->values(C::PIXELS * C::STRIDE);
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
  const Shared<T> shared{memory};
  float *mean = shared.floats(m.mean), *rstd = shared.floats(m.rstd);
  float *z_mean = shared.floats(m.z_mean), *z_rstd = shared.floats(m.z_rstd);
  float *z_sum = shared.floats(m.z_sum), *z_product = shared.floats(m.z_product);
  T *tokens = shared.tile(m.tokens), *hidden = shared.tile(m.hidden), *mixed = shared.tile(m.mixed),
    *gradient = shared.tile(m.gradient);
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
    prepare_tokens<E, R::AROUND>(a, place, mean, rstd, tokens, m.token_stride);
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
    make_hidden<E, R::AROUND>(a, place, mean, rstd, tokens, m.token_stride, shared.tile(m.weights), hidden, first);

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
      float mixed_part = 0, tap_parts[9] = {};  // of a tile: short sums
      for (int p = group; p < C::PIXELS; p += C::THREADS / C::CHUNK) {
        const int y = p / C::WIDTH, x = p % C::WIDTH;
        const float grad = to_float(mixed[((y + 1) * Ring::WIDTH + x + 1) * C::STRIDE + channel]);
        const T* from = hidden + ((y + R::AROUND - 1) * R::WIDTH + x + R::AROUND - 1) * C::STRIDE + channel;
        mixed_part += grad;
        for (int dy = 0; dy < 3; dy++)
          for (int dx = 0; dx < 3; dx++)
            tap_parts[dy * 3 + dx] += grad * to_float(from[(dy * R::WIDTH + dx) * C::STRIDE]);
      }
      mixed_sum.add(mixed_part);
      for (int t = 0; t < 9; t++) taps[t].add(tap_parts[t]);
    } else {
      for (int p = group; p < C::PIXELS; p += C::THREADS / C::CHUNK)
        gradient[p * C::STRIDE + channel] = from_float<T>(0.0f);
    }
    load_tokens<E, 0>(
        a, place, mean, rstd, [](int p) { return (p / C::WIDTH + R::AROUND) * R::WIDTH + p % C::WIDTH + R::AROUND; },
        tokens, m.pixel_stride, in, ins);
    __syncthreads();
    fc1_gradient.template add<true, false>(gradient, C::STRIDE, tokens, m.pixel_stride, C::PIXELS, channels, ins);
    __syncthreads();
  }

  float* partial = a.scratch.first_partials + blockIdx.y * a.scratch.first_size;
  fc1_gradient.each([&](int h, int c, float sum) {
    if (h < channels && c < ins) write(partial + static_cast<std::int64_t>(first + h) * g.channels + in + c, sum);
  });
  if (!writes) return;
  float* rest = partial + static_cast<std::int64_t>(g.channels) * g.hidden;  // 9 taps a channel, then two sums
  for (int t = 0; t < 9; t++)
    sum_groups<C>(shared.floats(m.sums), taps[t], [&](int c, float sum) {
      if (c < channels) write(rest + (first + c) * 9ll + t, sum);
    });
  sum_groups<C>(shared.floats(m.sums), mixed_sum, [&](int c, float sum) {
    if (c < channels) write(rest + g.hidden * 9ll + first + c, sum);
  });
  sum_groups<C>(shared.floats(m.sums), hidden_sum, [&](int c, float sum) {
    if (c < channels) write(rest + g.hidden * 10ll + first + c, sum);
  });
}

template <class E, bool NORM>
int launch_first(MixFFN a, void* stream) {
  const int shared = choose_chunk<FirstMemory<E, NORM>>(a);
  if (!shared) return OUT_OF_SHARED_MEMORY;
  return launch<mix_ffn_first_backward_kernel<E, NORM>>(grid_of_halves<E>(a), Config<E>::THREADS, shared, stream, a);
}

}  // namespace

int mix_ffn_first_backward(Engine engine, MixFFN a, void* stream) {
  const bool norm = a.arguments.parameters.hidden_norm.weight.data;
  return with_engine(engine, [&](auto e) {
    return norm ? launch_first<decltype(e), true>(a, stream) : launch_first<decltype(e), false>(a, stream);
  });
}

}  // namespace msformer::gpu
