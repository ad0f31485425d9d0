// The multiply-add rate that this processor reaches: independent accumulators in registers, no memory. The ceiling that
// benchmarks hold the kernels against; machine.py compiles it with -march=native when it is asked for.
#include <cstdint>

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kAccumulators = 24;  // more than latency times throughput, fewer than registers
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kAccumulators = 12;
#else
constexpr int kVectorBytes = 16, kAccumulators = 12;
#endif

typedef float Vector __attribute__((vector_size(kVectorBytes)));

namespace {

float multiply_add_loop(std::int64_t steps) {
  volatile float factor = 0.999f, summand = 1e-3f;  // no constants that the compiler could calculate with
  const Vector a = factor - Vector{}, b = summand - Vector{};
  Vector sums[kAccumulators];
#pragma GCC unroll 24
  for (int j = 0; j < kAccumulators; ++j) sums[j] = b * static_cast<float>(j);
  for (std::int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 24
    for (int j = 0; j < kAccumulators; ++j) sums[j] = sums[j] * a + b;
  }
  Vector total{};
#pragma GCC unroll 24
  for (int j = 0; j < kAccumulators; ++j) total += sums[j];
  return total[0];
}

}  // namespace

// flop done by num_threads threads in `steps` rounds; sink keeps the compiler from leaving the work out
extern "C" double multiply_adds(int num_threads, std::int64_t steps, float* sink) {
  float results = 0;
#pragma omp parallel for num_threads(num_threads) reduction(+ : results)
  for (int i = 0; i < num_threads; ++i) results += multiply_add_loop(steps);
  *sink = results;
  return 2.0 * kAccumulators * (kVectorBytes / 4) * static_cast<double>(steps) * num_threads;
}
