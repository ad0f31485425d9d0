// MixFFN, forward: one kernel, x read (with the halo) and the output written, nothing in between.
//
// With a norm over the hidden channels a block walks over them twice: once for the statistics of Z, once to normalise,
// activate and multiply by W_2. Where shared memory holds Z of all hidden channels (`keep`) it is made only once.
// Without the norm there is one walk. Output channels beyond Config::OUT go to blocks of their own, which make Z again.
#include "mix_ffn.h"

namespace msformer::gpu {
namespace {

template <class E>
struct ForwardMemory : HiddenMemory<E, 1> {
  using C = Config<E>;
  int z_mean, z_squares, fc2, z, z_stride;

  BOTH explicit ForwardMemory(const MixFFN& a) : HiddenMemory<E, 1>(a) {
    z_mean = this->floats(C::PIXELS);
    z_squares = this->floats(C::PIXELS);
    fc2 = this->values(C::OUT * C::STRIDE);
    z_stride = a.keep ? tile_stride<typename E::Store>(round_up(a.arguments.hidden, C::CHUNK)) : C::STRIDE;
    z = this->values(C::PIXELS * z_stride);
  }
};

template <class E>
KERNEL(Config<E>::THREADS, 1)
mix_ffn_forward_kernel(const MixFFN a) {
  using C = Config<E>;
  using T = typename E::Store;
  DYNAMIC_SHARED(memory);
  const ForwardMemory<E> m(a);
  const Shared<T> shared{memory};
  float *mean = shared.floats(m.mean), *rstd = shared.floats(m.rstd);
  float *z_mean = shared.floats(m.z_mean), *z_squares = shared.floats(m.z_squares);
  T *tokens = shared.tile(m.tokens), *hidden = shared.tile(m.hidden), *fc2 = shared.tile(m.fc2);

  const Place place = Place::of<C>(a, blockIdx.x);
  const int out = blockIdx.y * C::OUT, outs = min(C::OUT, a.arguments.channels - out);
  const bool norm = a.arguments.parameters.hidden_norm.weight.data != nullptr;
  prepare_tokens<E, 1>(a, place, mean, rstd, tokens, m.token_stride);

  Product<E, C::PIXELS, C::OUT, 4, C::WARPS> y;
  y.clear();
  for (int pass = norm ? 0 : 1; pass < 2; pass++)
    for (int first = 0; first < a.arguments.hidden; first += C::CHUNK) {
      const int channels = min(C::CHUNK, a.arguments.hidden - first);
      T* z = shared.tile(m.z) + (a.keep ? first : 0);
      if (pass == 1) {
        stage(fc2, C::STRIDE, C::OUT, C::CHUNK, a.arguments.parameters.fc2_weight, a.arguments.hidden, out, first, outs,
              channels, C::THREADS);
        commit();
      }
      if (pass == 0 || !norm || !a.keep) {
        make_hidden<E, 1>(a, place, mean, rstd, tokens, m.token_stride, shared.tile(m.weights), hidden, first);
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
              norm ? reciprocal_deviation(z_squares[p] / static_cast<float>(a.arguments.hidden), a.arguments.eps) : 1;
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
  MixFFN a{arguments, round_up(arguments.channels, 16), arguments.parameters.hidden_norm.weight.data != nullptr, {}};
  int shared = ForwardMemory<E>(a).all();
  if (!a.keep || shared > most_shared()) {
    a.keep = false;
    shared = choose_chunk<ForwardMemory<E>>(a);
  }
  if (!shared) return OUT_OF_SHARED_MEMORY;
  const dim3 grid(static_cast<unsigned>(count_tiles<C>(a)), ceil_div(arguments.channels, C::OUT));
  return launch<mix_ffn_forward_kernel<E>>(grid, C::THREADS, shared, stream, a);
}

}  // namespace

int mix_ffn_forward(Engine engine, const MixFFNArguments& arguments, void* stream) {
  return with_engine(engine, [&](auto e) { return forward<decltype(e)>(arguments, stream); });
}

}  // namespace msformer::gpu
