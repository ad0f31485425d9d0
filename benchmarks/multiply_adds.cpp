// The multiply-add rate that this instruction set reaches on this machine: independent accumulators in registers, no memory.
// The ceiling that benchmarks hold the kernels against.
#include "arguments.h"
#include "parallel.h"

namespace msformer::MSFORMER_ISA {
namespace {

constexpr int kAccumulators = MSFORMER_VECTOR_BYTES == 64 ? 24 : 12;  // more than latency times throughput, fewer than registers

template <class T> T multiply_add_loop(std::int64_t steps) {
  volatile T factor = T(0.999), summand = T(1e-3);  // no constants that the compiler could calculate with
  const Vector<T> a = splat<T>(factor), b = splat<T>(summand);
  Vector<T> sums[kAccumulators];
#pragma GCC unroll 24
  for (int j = 0; j < kAccumulators; ++j) sums[j] = b * static_cast<T>(j);
  for (std::int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 24
    for (int j = 0; j < kAccumulators; ++j) sums[j] = sums[j] * a + b;
  }
  Vector<T> total{};
#pragma GCC unroll 24
  for (int j = 0; j < kAccumulators; ++j) total += sums[j];
  return horizontal_sum<T>(total);
}

}  // namespace

// flop done by num_threads threads in `steps` rounds; sink keeps the compiler from leaving the work out
double multiply_adds(int num_threads, std::int64_t steps, double* sink) {
  double results[256];
  const int threads = static_cast<int>(min_of<std::int64_t>(num_threads, 256));
  parallel_for(threads, threads, 64, [&](std::int64_t i, void*) { results[i] = multiply_add_loop<float>(steps); });
  for (int i = 0; i < threads; ++i) *sink += results[i];
  return 2.0 * kAccumulators * kWidth<float> * static_cast<double>(steps) * threads;
}

}  // namespace msformer::MSFORMER_ISA
