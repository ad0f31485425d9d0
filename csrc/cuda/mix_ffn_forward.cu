// MixFFN, forward: one kernel, x read (with the halo) and the output written, nothing in between.
//
// With a norm over the hidden channels a block walks over them twice: once for the statistics of Z, once to normalise,
// activate and multiply by W_2. Where shared memory holds Z of all hidden channels (`keep`) it is made only once.
// Without the norm there is one walk. Output channels beyond Config::OUT go to blocks of their own, which make Z again.
#include "mix_ffn.h"

namespace msformer::gpu {
namespace {

template <class E>
struct ForwardMemory {
  using C = Config<E>;
  using R = Region<E, 1>;
  int mean, rstd, z_mean, z_squares, tokens, hidden, z, fc1, fc2, all, z_stride;

  BOTH explicit ForwardMemory(const MixFFN& a) {
    constexpr int SIZE = sizeof(typename E::Store);
    Carver m;
    mean = m.take(R::ROWS * 4);
    rstd = m.take(R::ROWS * 4);
    z_mean = m.take(C::PIXELS * 4);
    z_squares = m.take(C::PIXELS * 4);
    const int stride = tile_stride<typename E::Store>(a.channel_chunk);
    tokens = m.take(R::ROWS * stride * SIZE);
    hidden = m.take(R::ROWS * C::STRIDE * SIZE);
    fc1 = m.take(C::CHUNK * stride * SIZE);
    fc2 = m.take(C::OUT * C::STRIDE * SIZE);
    z_stride = a.keep ? tile_stride<typename E::Store>(round_up(a.arguments.hidden, C::CHUNK)) : C::STRIDE;
    z = m.take(C::PIXELS * z_stride * SIZE);
    all = m.used;
  }
};

template <class E>
KERNEL(Config<E>::THREADS, 1)
mix_ffn_forward_kernel(const MixFFN a) {
  using C = Config<E>;
  using T = typename E::Store;
  DYNAMIC_SHARED(memory);
  const ForwardMemory<E> m(a);
  auto floats = [&](int at) { return reinterpret_cast<float*>(memory + at); };
  auto tile = [&](int at) { return reinterpret_cast<T*>(memory + at); };
  float *mean = floats(m.mean), *rstd = floats(m.rstd), *z_mean = floats(m.z_mean), *z_squares = floats(m.z_squares);
  T *tokens = tile(m.tokens), *hidden = tile(m.hidden), *fc1 = tile(m.fc1), *fc2 = tile(m.fc2);

  const Place place = Place::of<C>(a, blockIdx.x);
  const int out = blockIdx.y * C::OUT, outs = min(C::OUT, a.arguments.channels - out);
  const bool norm = a.arguments.parameters.hidden_norm.weight.data != nullptr;
  input_statistics<E, 1>(a, place, mean, rstd);
  __syncthreads();
  if (a.channel_chunk >= a.arguments.channels)
    load_tokens<E, 1>(
        a, place, mean, rstd, [](int r) { return r; }, tokens, tile_stride<T>(a.channel_chunk), 0,
        a.arguments.channels);

  Product<E, C::PIXELS, C::OUT, 4, C::WARPS> y;
  y.clear();
  for (int pass = norm ? 0 : 1; pass < 2; pass++)
    for (int first = 0; first < a.arguments.hidden; first += C::CHUNK) {
      const int channels = min(C::CHUNK, a.arguments.hidden - first);
      T* z = tile(m.z) + (a.keep ? first : 0);
      if (pass == 1) {
        stage(fc2, C::STRIDE, C::OUT, C::CHUNK, a.arguments.parameters.fc2_weight, a.arguments.hidden, out, first, outs,
              channels, C::THREADS);
        commit();
      }
      if (pass == 0 || !norm || !a.keep) {
        make_hidden<E, 1>(a, place, mean, rstd, tokens, tile_stride<T>(a.channel_chunk), fc1, hidden, first);
        convolve<E, 0, false>(a, hidden, first,
                              [&](int p, int c, float value) { z[p * m.z_stride + c] = from_float<T>(value); });
        __syncthreads();
      }
      if (pass == 0) {
        join_statistics(z_mean, z_squares, z, m.z_stride, C::PIXELS, channels, first, C::WARPS);
        __syncthreads();
        continue;
      }
      for (int i = threadIdx.x; i < C::PIXELS * C::CHUNK; i += C::THREADS) {
        const int p = i / C::CHUNK, c = i % C::CHUNK;
        float value = 0;
        if (c < channels) {
          const float scale =
              norm ? rsqrtf(z_squares[p] / static_cast<float>(a.arguments.hidden) + a.arguments.eps) : 1;
          value = normalize_hidden<T>(a, to_float(z[p * m.z_stride + c]), z_mean[p], scale, first + c);
          value = activate(a.arguments.activation, value);
        }
        z[p * m.z_stride + c] = from_float<T>(value);
      }
      wait<0>();
      __syncthreads();
      y.template add<false, true>(z, m.z_stride, fc2, C::STRIDE, round_up(channels, 16), C::PIXELS, outs);
      __syncthreads();
    }

  y.each([&](int p, int c, float sum) {
    const std::int64_t token = place.template token<Region<E, 0>>(a, p);
    if (token < 0 || c >= outs) return;
    if (a.arguments.parameters.fc2_bias.data) sum += element<T>(a.arguments.parameters.fc2_bias, out + c);
    if (a.arguments.residual) sum += to_float(read(address<T>(a.arguments.x, place.image, token, out + c)));
    write(address<T>(a.arguments.output, place.image, token, out + c), from_float<T>(sum));
  });
}

template <class E>
int forward(const MixFFNArguments& arguments, void* stream) {
  using C = Config<E>;
  MixFFN a{arguments, 0, arguments.parameters.hidden_norm.weight.data != nullptr, {}};
  auto bytes = [&](int chunk) {
    a.channel_chunk = chunk;
    return ForwardMemory<E>(a).all;
  };
  int chunk = round_up(arguments.channels, 16);
  if (!a.keep || bytes(chunk) > most_shared()) {
    a.keep = false;
    chunk = largest_channel_chunk(arguments.channels, bytes);
  }
  if (!chunk) return OUT_OF_SHARED_MEMORY;
  const int shared = bytes(chunk);
  const dim3 grid(static_cast<unsigned>(count_tiles<C>(a)), ceil_div(arguments.channels, C::OUT));
  return launch<mix_ffn_forward_kernel<E>>(grid, C::THREADS, shared, stream, a);
}

}  // namespace

int mix_ffn_forward(Engine engine, const MixFFNArguments& arguments, void* stream) {
  return with_engine(engine, [&](auto e) { return forward<decltype(e)>(arguments, stream); });
}

}  // namespace msformer::gpu
