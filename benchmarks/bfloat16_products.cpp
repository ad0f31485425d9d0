// The rates that this processor reaches in products of bfloat16 that are summed in float, from registers: pairs of
// AVX-512 BF16, and the tiles of AMX, a block of four sums as the kernels have it. machine.py compiles it with
// -march=native when it is asked for. It needs no other file, for it is installed without csrc.
#include <cstdint>
#if defined(__AVX512BF16__)
#include <immintrin.h>
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
// tmm0 to tmm3 are the sums, tmm4 and tmm5 the left tiles, tmm6 and tmm7 the right ones; all are full
float tile_loop(std::int64_t steps) {
  struct alignas(64) {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } configuration;
  alignas(64) std::uint16_t ones[16 * 32];
  alignas(64) float sums[4][16 * 16];
  for (std::uint16_t& one : ones) one = 0x3f80;
  const std::int64_t stride = 64;
  asm volatile("ldtilecfg %0" ::"m"(configuration) : "memory");
  asm volatile(
      "tileloadd (%0,%1,1), %%tmm4\n\ttileloadd (%0,%1,1), %%tmm5\n\t"
      "tileloadd (%0,%1,1), %%tmm6\n\ttileloadd (%0,%1,1), %%tmm7" ::"r"(ones),
      "r"(stride)
      : "memory");
  for (std::int64_t i = 0; i < steps; ++i)
    asm volatile(
        "tdpbf16ps %tmm6, %tmm4, %tmm0\n\ttdpbf16ps %tmm7, %tmm4, %tmm1\n\t"
        "tdpbf16ps %tmm6, %tmm5, %tmm2\n\ttdpbf16ps %tmm7, %tmm5, %tmm3");
  asm volatile("tilestored %%tmm0, (%0,%1,1)" ::"r"(sums[0]), "r"(stride) : "memory");
  asm volatile("tilestored %%tmm1, (%0,%1,1)" ::"r"(sums[1]), "r"(stride) : "memory");
  asm volatile("tilestored %%tmm2, (%0,%1,1)" ::"r"(sums[2]), "r"(stride) : "memory");
  asm volatile("tilestored %%tmm3, (%0,%1,1)\n\ttilerelease" ::"r"(sums[3]), "r"(stride) : "memory");
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
