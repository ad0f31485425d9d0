// Sums over rows and over partial results, in an order that depends on the shape alone.
#pragma once

#include "parallel.h"

namespace msformer::MSFORMER_VARIANT {

template <class T>
inline void add_rows(std::int64_t rows, std::int64_t leading, const T* in, T* out) {
  for (std::int64_t i = 0; i < rows * leading; i += kWidth<T>) store(out + i, load(out + i) + load(in + i));
}

template <class T>
inline void fill(T* out, std::int64_t count, T value) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = value;
}

// sum of rows of one column of vectors, as a sum of sums over a few rows each: the rounding error grows with the
// logarithm of their number
template <class T>
Vector<T> column_sum(std::int64_t rows, const T* in, std::int64_t leading) {
  constexpr std::int64_t kRows = 16;
  if (rows > kRows) {
    const std::int64_t half = (rows / 2 + kRows - 1) / kRows * kRows;
    return column_sum(half, in, leading) + column_sum(rows - half, in + half * leading, leading);
  }
  Vector<T> sums[4] = {};
  for (std::int64_t i = 0; i < rows; ++i) sums[i % 4] += load(in + i * leading);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// out [width] += sum of the rows of in
template <class T>
inline void add_column_sums(std::int64_t rows, std::int64_t width, const T* in, std::int64_t leading, T* out) {
  for (std::int64_t c = 0; c < width; c += kWidth<T>) store(out + c, load(out + c) + column_sum(rows, in + c, leading));
}

// out[i] = sum over p of partials[p * stride + i] (times factors[p], unless null), in double, in the order of p
template <class T>
void combine_partials(const T* partials, const double* factors, std::int64_t count, std::int64_t stride, std::int64_t n,
                      T* out) {
  constexpr std::int64_t kBlock = 64;
  for (std::int64_t begin = 0; begin < n; begin += kBlock) {
    const std::int64_t size = min_of(kBlock, n - begin);
    double sums[kBlock] = {};
    for (std::int64_t p = 0; p < count; ++p) {
      const T* partial = partials + p * stride + begin;
      const double factor = factors ? factors[p] : 1.0;
      for (std::int64_t i = 0; i < size; ++i) sums[i] += factor * static_cast<double>(partial[i]);
    }
    for (std::int64_t i = 0; i < size; ++i) out[begin + i] = static_cast<T>(sums[i]);
  }
}

// How many partial sums of `bytes` each are kept for `tasks` tasks: as many as 64, fewer where they are large.
inline std::int64_t group_count(std::int64_t tasks, std::int64_t bytes) {
  const std::int64_t affordable = max_of<std::int64_t>(8, min_of<std::int64_t>(64, (std::int64_t{32} << 20) / bytes));
  return min_of(tasks, affordable);
}

// total [size] = sum of the groups' partials
template <class T>
void combine_groups(const T* partials, std::int64_t groups, std::int64_t size, int num_threads, T* total) {
  constexpr std::int64_t kPiece = 4096;
  parallel_for((size + kPiece - 1) / kPiece, num_threads, 64, [&](std::int64_t i, void*) {
    const std::int64_t begin = i * kPiece;
    combine_partials<T>(partials + begin, nullptr, groups, size, min_of(kPiece, size - begin), total + begin);
  });
}

template <class T>
inline void copy_out(const T* source, std::int64_t count, void* target) {
  if (target) std::memcpy(target, source, sizeof(T) * static_cast<std::size_t>(count));
}

}  // namespace msformer::MSFORMER_VARIANT
