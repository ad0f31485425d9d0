// The rates that this processor reaches in products of bfloat16 that are summed in float, from registers: pairs of
// AVX-512 BF16, and the tiles of AMX, a block of four sums as the kernels have it. machine.py compiles it with
// -march=native when it is asked for.
#include <cstdint>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#if defined(__x86_64__)
#define MSFORMER_VARIANT ceilings
#include "../csrc/cpu/engine/amx.h"
#endif

namespace {

constexpr int kAccumulators = 24;  // more than latency times throughput, fewer than registers

#if defined(__AVX512BF16__)
float pair_loop(std::int64_t steps) {
  volatile float factor = 0.999f, other = 1e-3f;  // no constants that the compiler could calculate with
  const auto a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(factor), _mm512_set1_ps(factor));
  const auto b = _mm512_cvtne2ps_pbh(_mm512_set1_ps(other), _mm512_set1_ps(other));
  __m512 sums[kAccumulators];
#pragma GCC unroll 24
  for (int j = 0; j < kAccumulators; ++j) sums[j] = _mm512_set1_ps(other * static_cast<float>(j));
  for (std::int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 24
    for (int j = 0; j < kAccumulators; ++j) sums[j] = _mm512_dpbf16_ps(sums[j], a, b);
  }
  __m512 total = sums[0];
#pragma GCC unroll 24
  for (int j = 1; j < kAccumulators; ++j) total = _mm512_add_ps(total, sums[j]);
  return _mm512_cvtss_f32(total);
}
#endif

#if defined(__x86_64__)
float tile_loop(std::int64_t steps) {
  alignas(64) std::uint16_t ones[16 * 32];
  alignas(64) float sums[4][16 * 16];
  for (std::uint16_t& one : ones) one = 0x3f80;
  {
    msformer::ceilings::Amx tiles;
    tiles.configure(16, 16);
    tiles.load_left<0>(ones, 32);
    tiles.load_left<1>(ones, 32);
    tiles.load_right<0>(ones);
    tiles.load_right<1>(ones);
    for (std::int64_t i = 0; i < steps; ++i) {
      tiles.multiply_add<0, 0>();
      tiles.multiply_add<0, 1>();
      tiles.multiply_add<1, 0>();
      tiles.multiply_add<1, 1>();
    }
    tiles.store_sum<0>(sums[0], 16);
    tiles.store_sum<1>(sums[1], 16);
    tiles.store_sum<2>(sums[2], 16);
    tiles.store_sum<3>(sums[3], 16);
  }
  float total = 0;
  for (const auto& sum : sums)
    for (float value : sum) total += value;
  return total;
}
#endif

template <class Loop>
float on_threads(int num_threads, Loop loop) {
  float results = 0;
#pragma omp parallel for num_threads(num_threads) reduction(+ : results)
  for (int i = 0; i < num_threads; ++i) results += loop();
  return results;
}

}  // namespace

// flop done by num_threads threads in `steps` rounds, 0 without the instructions; sink keeps the compiler from leaving
// the work out
extern "C" double pair_products(int num_threads, std::int64_t steps, float* sink) {
#if defined(__AVX512BF16__)
  *sink = on_threads(num_threads, [=] { return pair_loop(steps); });
  return 2.0 * 32 * kAccumulators * static_cast<double>(steps) * num_threads;
#else
  return 0;
#endif
}

// the caller has the permission to use tiles
extern "C" double tile_products(int num_threads, std::int64_t steps, float* sink) {
#if defined(__x86_64__)
  *sink = on_threads(num_threads, [=] { return tile_loop(steps); });
  return 2.0 * 16 * 16 * 32 * 4 * static_cast<double>(steps) * num_threads;
#else
  return 0;
#endif
}
